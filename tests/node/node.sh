#!/bin/sh
# The first process of a node: containerd and the kubelet, in separate mount and process namespaces.
#
#   unshare --mount --propagation private --pid --fork --kill-child node.sh DIR TOOLS NAME CGROUP
#
# DIR contains images/*.tar and kubelet.kubeconfig, and gets the logs; TOOLS contains the programs. This process ends with its standard
# input. All processes started here end with it, and the files end with the namespace: the usual directories are file systems in memory
# here.
set -eu
trap 'exit 1' INT TERM
dir=$1 tools=$2 name=$3 cgroup=$4
here=$(dirname "$0")

mount -t proc proc /proc

# /var with the machine's content; writes go to an overlay in memory.
mkdir "$dir/var"
mount -t tmpfs -o mode=755 node "$dir/var"
mkdir "$dir/var/upper" "$dir/var/work"
mount -t overlay -o "lowerdir=/var,upperdir=$dir/var/upper,workdir=$dir/var/work" node /var
for place in /var/lib/kubelet /var/lib/containerd /var/log/pods /var/log/containers /run; do
    mkdir -p "$place"
    mount -t tmpfs -o mode=755 node "$place"
done
mkdir -p /run/cni
# Mounts below propagate to the pods that request it, and back, as on a machine with systemd.
mount --make-rshared /var/lib/kubelet
mount --make-rshared /run

# The kubelet sets these for the whole machine, unless they have these values already.
setting() {
    [ -e "/proc/sys/$1" ] || return 0
    seen=$dir/$(basename "$1")
    echo "$2" >"$seen"
    mount --bind "$seen" "/proc/sys/$1"
}
setting vm/overcommit_memory 1
setting vm/panic_on_oom 0
setting kernel/panic 10
setting kernel/panic_on_oops 1
setting kernel/keys/root_maxkeys 1000000
setting kernel/keys/root_maxbytes 25000000

PATH=$tools:$PATH
export PATH
containerd --config "$here/containerd.toml" >"$dir/containerd.log" 2>&1 &
tries=0
until ctr version >/dev/null 2>&1; do
    tries=$((tries + 1))
    [ "$tries" -lt 300 ] || { echo "containerd does not answer" >&2; tail -n 40 "$dir/containerd.log" >&2; exit 1; }
    sleep 0.1
done
for image in "$dir"/images/*.tar; do
    ctr --namespace k8s.io images import "$image"
done

{ cat "$here/kubelet.yaml"; echo "cgroupRoot: $cgroup"; } >"$dir/kubelet.yaml"
kubelet --config "$dir/kubelet.yaml" --kubeconfig "$dir/kubelet.kubeconfig" --hostname-override "$name" >"$dir/kubelet.log" 2>&1 &
echo ready
cat >/dev/null
