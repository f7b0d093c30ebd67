// Many pods, for tests of programs that read all of them. One is created through the
// API as controllers and kubelets do; the others are copies of its bytes in etcd with
// different names. This takes seconds, and creation through the API takes minutes.

package main

import (
	"bytes"
	"context"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

const (
	crowdNamespace = "crowd"
	// crowdBatch is the number of pods in one write; etcd accepts 128, and 1.5 MiB.
	crowdBatch = 100
	// crowdNode is the number of pods of a node.
	crowdNode = 30
	// crowdPods is the maximum that the digits of their names allow.
	crowdPods = 1000000
)

// crowdNames are the differences between the pods. All names of one kind have the same
// length, so that they can be replaced in encoded bytes.
func crowdNames(n int) (name, node, account string) {
	return fmt.Sprintf("crowd-%06d-pod", n), fmt.Sprintf("crowd-%06d-node", n/crowdNode), fmt.Sprintf("crowd-%02d-account", n%25)
}

// makeCrowd creates count pods, unless they exist.
func (p *plane) makeCrowd(admin *clients, count int) error {
	if count == 0 {
		return nil
	}
	client := v3client.New(p.etcd)
	defer client.Close()
	last, _, _ := crowdNames(count - 1)
	if found, err := client.Get(p.ctx, crowdKey(last), clientv3.WithKeysOnly()); err != nil || found.Count > 0 {
		return err
	}
	first, err := p.makeFirst(admin)
	if err != nil {
		return fmt.Errorf("cannot make the first of many pods: %w", err)
	}
	found, err := client.Get(p.ctx, crowdKey(first.Name))
	if err != nil || len(found.Kvs) != 1 {
		return fmt.Errorf("the first of many pods is not in etcd: %w", err)
	}
	for begin := 1; begin < count; begin += crowdBatch {
		var puts []clientv3.Op
		for n := begin; n < min(begin+crowdBatch, count); n++ {
			name, value := copyPod(found.Kvs[0].Value, first, n)
			puts = append(puts, clientv3.OpPut(crowdKey(name), string(value)))
		}
		if _, err := client.Txn(p.ctx).Then(puts...).Commit(); err != nil {
			return fmt.Errorf("cannot copy pods: %w", err)
		}
	}
	return p.awaitCrowd(admin, last)
}

// awaitCrowd returns when the API server also returns the last pod from its cache.
func (p *plane) awaitCrowd(admin *clients, last string) error {
	return p.await("the API server knows all pods", 50*time.Millisecond, func(ctx context.Context) (bool, error) {
		_, err := admin.kube.CoreV1().Pods(crowdNamespace).Get(ctx, last, metav1.GetOptions{ResourceVersion: "0"})
		return err == nil, err
	})
}

func crowdKey(name string) string { return "/registry/pods/" + crowdNamespace + "/" + name }

// copyPod returns the bytes of another pod, and its name.
func copyPod(value []byte, first *corev1.Pod, n int) (string, []byte) {
	oldName, oldNode, oldAccount := crowdNames(0)
	name, node, account := crowdNames(n)
	uid := fmt.Sprintf("%08x%s", n, first.UID[8:])
	for _, pair := range [][2]string{{oldName, name}, {oldNode, node}, {oldAccount, account}, {string(first.UID), uid}} {
		value = bytes.ReplaceAll(value, []byte(pair[0]), []byte(pair[1]))
	}
	return name, value
}

// makeFirst creates a pod like a real one: the spec by a controller, the status by a
// kubelet, with managed fields of both.
func (p *plane) makeFirst(admin *clients) (*corev1.Pod, error) {
	namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: crowdNamespace}}
	if _, err := admin.kube.CoreV1().Namespaces().Create(p.ctx, namespace, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return nil, err
	}
	name, node, account := crowdNames(0)
	accounts := admin.kube.CoreV1().ServiceAccounts(crowdNamespace)
	owner := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: account}}
	if _, err := accounts.Create(p.ctx, owner, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return nil, err
	}
	pods := admin.kube.CoreV1().Pods(crowdNamespace)
	pod, err := pods.Create(p.ctx, crowdPod(name, node, account), metav1.CreateOptions{FieldManager: "kube-controller-manager"})
	if apierrors.IsAlreadyExists(err) {
		pod, err = pods.Get(p.ctx, name, metav1.GetOptions{})
	}
	if err != nil {
		return nil, err
	}
	pod.Status = crowdStatus(pod)
	return pods.UpdateStatus(p.ctx, pod, metav1.UpdateOptions{FieldManager: "kubelet"})
}

// crowdPod is a small service with a proxy as sidecar.
func crowdPod(name, node, account string) *corev1.Pod {
	variable := func(name, value string) corev1.EnvVar { return corev1.EnvVar{Name: name, Value: value} }
	field := func(name, path string) corev1.EnvVar {
		return corev1.EnvVar{Name: name, ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: path}}}
	}
	probe := func(path string, port int32) *corev1.Probe {
		get := &corev1.HTTPGetAction{Path: path, Port: intstr.FromInt32(port)}
		return &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: get}, InitialDelaySeconds: 5, TimeoutSeconds: 3, PeriodSeconds: 10}
	}
	resources := func(cpu, memory string) corev1.ResourceRequirements {
		list := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(cpu), corev1.ResourceMemory: resource.MustParse(memory)}
		return corev1.ResourceRequirements{Requests: list, Limits: list}
	}
	yes, no, user := true, false, int64(1337)
	security := &corev1.SecurityContext{
		AllowPrivilegeEscalation: &no, ReadOnlyRootFilesystem: &yes, RunAsNonRoot: &yes, RunAsUser: &user,
		Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
	}
	mode := int32(0o444)
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Name: name, Namespace: crowdNamespace,
			Labels: map[string]string{
				"app.kubernetes.io/name": "checkout", "app.kubernetes.io/instance": "checkout-production", "app.kubernetes.io/version": "3.14.15",
				"app.kubernetes.io/managed-by": "Helm", "pod-template-hash": "5d89c7b6f4", "security.istio.io/tlsMode": "istio",
			},
			Annotations: map[string]string{
				"kubectl.kubernetes.io/restartedAt": "2026-01-02T03:04:05Z", "prometheus.io/scrape": "true", "prometheus.io/port": "9090",
				"checksum/config": "6f1ed002ab5595859014ebf0951522d9aae8a4e5d3c9f6f0b9a9b8d8e8a1c2d3",
			},
		},
		Spec: corev1.PodSpec{
			NodeName: node, ServiceAccountName: account, TerminationGracePeriodSeconds: new(int64(60)),
			SecurityContext: &corev1.PodSecurityContext{FSGroup: &user, SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault}},
			Volumes: []corev1.Volume{
				{Name: "configuration", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{
					LocalObjectReference: corev1.LocalObjectReference{Name: "checkout-configuration"}, DefaultMode: &mode}}},
				{Name: "scratch", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
				{Name: "credentials", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "checkout-credentials"}}},
			},
			Containers: []corev1.Container{
				{
					Name: "checkout", Image: "registry.example.com/shop/checkout:3.14.15", Args: []string{"--config=/etc/checkout/config.yaml", "--log-format=json"},
					Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}, {Name: "metrics", ContainerPort: 9090}},
					Env: []corev1.EnvVar{
						field("POD_NAME", "metadata.name"), field("POD_NAMESPACE", "metadata.namespace"), field("POD_IP", "status.podIP"),
						variable("DATABASE_HOST", "database.shop.svc.cluster.local"), variable("CACHE_HOST", "cache.shop.svc.cluster.local"),
						variable("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector.observability.svc.cluster.local:4317"),
						variable("FEATURE_FLAGS", "new-basket,express-checkout,split-payments"),
					},
					Resources: resources("500m", "512Mi"), SecurityContext: security, LivenessProbe: probe("/livez", 8080), ReadinessProbe: probe("/readyz", 8080),
					VolumeMounts: []corev1.VolumeMount{
						{Name: "configuration", MountPath: "/etc/checkout", ReadOnly: true}, {Name: "scratch", MountPath: "/tmp"},
						{Name: "credentials", MountPath: "/etc/credentials", ReadOnly: true},
					},
				},
				{
					Name: "proxy", Image: "registry.example.com/mesh/envoy:v1.38.3", Args: []string{"-c", "/etc/envoy/envoy.yaml", "--concurrency", "2"},
					Ports:     []corev1.ContainerPort{{Name: "tls", ContainerPort: 15443}, {Name: "admin", ContainerPort: 15000}},
					Env:       []corev1.EnvVar{field("NODE", "spec.nodeName"), field("SERVICE_ACCOUNT", "spec.serviceAccountName"), variable("LOG_LEVEL", "warning")},
					Resources: resources("100m", "128Mi"), SecurityContext: security, ReadinessProbe: probe("/ready", 15000),
					VolumeMounts: []corev1.VolumeMount{{Name: "scratch", MountPath: "/tmp"}},
				},
			},
			Tolerations: []corev1.Toleration{{Key: "dedicated", Operator: corev1.TolerationOpEqual, Value: "shop", Effect: corev1.TaintEffectNoSchedule}},
		},
	}
}

// crowdStatus is the status that a kubelet writes.
func crowdStatus(pod *corev1.Pod) corev1.PodStatus {
	now := metav1.Now()
	status := corev1.PodStatus{
		Phase: corev1.PodRunning, StartTime: &now, HostIP: "10.20.30.40", HostIPs: []corev1.HostIP{{IP: "10.20.30.40"}}, PodIP: "10.244.17.23",
		PodIPs: []corev1.PodIP{{IP: "10.244.17.23"}}, QOSClass: corev1.PodQOSGuaranteed,
	}
	for _, kind := range []corev1.PodConditionType{
		corev1.PodReadyToStartContainers, corev1.PodInitialized, corev1.PodReady, corev1.ContainersReady, corev1.PodScheduled,
	} {
		status.Conditions = append(status.Conditions, corev1.PodCondition{Type: kind, Status: corev1.ConditionTrue, LastTransitionTime: now})
	}
	running := corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: now}}
	told := func(container corev1.Container, digit byte) corev1.ContainerStatus {
		digest, started := string(bytes.Repeat([]byte{digit}, 64)), true
		return corev1.ContainerStatus{
			Name: container.Name, Image: container.Image, ImageID: container.Image + "@sha256:" + digest, ContainerID: "containerd://" + digest,
			State: running, Ready: true, Started: &started,
		}
	}
	for n, container := range pod.Spec.Containers {
		status.ContainerStatuses = append(status.ContainerStatuses, told(container, byte('a'+n)))
	}
	return status
}
