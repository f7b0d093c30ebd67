package main
import ("testing";"time";"fmt";"sync"
metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
cmmeta "github.com/cert-manager/cert-manager/pkg/apis/meta/v1"
cmapi "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
cmclient "github.com/cert-manager/cert-manager/pkg/client/clientset/versioned"
)
func TestLoad(t *testing.T){
 c:=start(t,t.TempDir(), "--audit")
 cfg:=*c.config; cfg.QPS=-1
 cm:=cmclient.NewForConfigOrDie(&cfg)
 rs:=cm.CertmanagerV1().CertificateRequests(agentNamespace)
 b:=time.Now()
 var wg sync.WaitGroup
 for w:=0;w<8;w++{ wg.Add(1); go func(){ defer wg.Done(); for i:=0;i<100;i++{ if _,err:=rs.Create(t.Context(),certificateRequest(t,fmt.Sprintf("r-%d-%d",w,i)),metav1.CreateOptions{});err!=nil{t.Error(err)}}}()}
 wg.Wait()
 t.Logf("created after %v",time.Since(b))
 for { l,_:=rs.List(t.Context(),metav1.ListOptions{}); n:=0; for i:=range l.Items{ if conditionOf(&l.Items[i],cmapi.CertificateRequestConditionReady)==cmmeta.ConditionTrue {n++}}; t.Logf("%v ready %d/%d",time.Since(b),n,len(l.Items)); if n==800{break}; time.Sleep(time.Second); if time.Since(b)>2*time.Minute{break}}
}
