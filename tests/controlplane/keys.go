// Keys and certificates: the cluster's own CA, the API server's certificate, the
// key that signs service account tokens, and client certificates for users.

package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

const tenYears = 10 * 365 * 24 * time.Hour

// authority is a CA that can sign.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
	pem         []byte
}

// keys are the credentials with which the API server is started. They stay in DIR/pki,
// so that kubeconfigs and tokens remain valid after a second start on the same
// directory.
type keys struct {
	dir     string
	cluster *authority
}

func (k *keys) file(name string) string { return filepath.Join(k.dir, name) }

// loadOrCreateKeys reads DIR/pki, or creates it.
func loadOrCreateKeys(dir string) (*keys, error) {
	k := &keys{dir: dir}
	certificate, err := os.ReadFile(k.file("ca.crt"))
	if errors.Is(err, fs.ErrNotExist) {
		return k, k.create()
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read the cluster's CA: %w", err)
	}
	key, err := os.ReadFile(k.file("ca.key"))
	if err != nil {
		return nil, fmt.Errorf("cannot read the cluster's CA key: %w", err)
	}
	if k.cluster, err = parseAuthority(certificate, key); err != nil {
		return nil, fmt.Errorf("the cluster's CA in %s is unusable: %w", dir, err)
	}
	return k, nil
}

func (k *keys) create() error {
	if err := os.MkdirAll(k.dir, 0o700); err != nil {
		return fmt.Errorf("cannot create the key directory: %w", err)
	}
	var err error
	if k.cluster, err = newAuthority("controlplane cluster CA"); err != nil {
		return err
	}
	signer, tokenKey, err := newKey()
	if err != nil {
		return err
	}
	tokenPublic, err := x509.MarshalPKIXPublicKey(signer.Public())
	if err != nil {
		return fmt.Errorf("cannot encode the public token key: %w", err)
	}
	serving, servingKey, err := k.cluster.issue(&x509.Certificate{
		Subject:     pkix.Name{CommonName: "kube-apiserver"},
		DNSNames:    []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback, net.ParseIP(firstServiceIP)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	if err != nil {
		return err
	}
	clusterKey, err := encodeKey(k.cluster.key)
	if err != nil {
		return err
	}
	// ca.crt is written last: its presence means that the other files exist.
	for _, file := range []struct {
		name    string
		content []byte
	}{
		{"sa.key", tokenKey}, {"sa.pub", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: tokenPublic})},
		{"apiserver.crt", serving}, {"apiserver.key", servingKey},
		{"ca.key", clusterKey}, {"ca.crt", k.cluster.pem},
	} {
		if err := os.WriteFile(k.file(file.name), file.content, 0o600); err != nil {
			return fmt.Errorf("cannot write a key: %w", err)
		}
	}
	return nil
}

// client issues a client certificate for a user in the form that the API server reads:
// the common name is the user, the organisations are the groups.
func (k *keys) client(who user) (certificate, key []byte, err error) {
	return k.cluster.issue(&x509.Certificate{
		Subject:     pkix.Name{CommonName: who.name, Organization: who.groups},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
}

// newAuthority creates a self-signed P-256 root with a lifetime of ten years.
func newAuthority(name string) (*authority, error) {
	key, _, err := newKey()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: name},
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature,
	}
	if err := complete(template); err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("cannot create the CA %q: %w", name, err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("cannot read back the CA %q: %w", name, err)
	}
	return &authority{certificate: certificate, key: key, pem: encodeCertificate(der)}, nil
}

func parseAuthority(certificatePEM, keyPEM []byte) (*authority, error) {
	certificateBlock, _ := pem.Decode(certificatePEM)
	keyBlock, _ := pem.Decode(keyPEM)
	if certificateBlock == nil || keyBlock == nil {
		return nil, errors.New("not PEM")
	}
	certificate, err := x509.ParseCertificate(certificateBlock.Bytes)
	if err != nil {
		return nil, err
	}
	key, err := x509.ParsePKCS8PrivateKey(keyBlock.Bytes)
	if err != nil {
		return nil, err
	}
	ecKey, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, errors.New("not an ECDSA key")
	}
	return &authority{certificate: certificate, key: ecKey, pem: certificatePEM}, nil
}

// issue signs a leaf with a new key.
func (a *authority) issue(template *x509.Certificate) (certificatePEM, keyPEM []byte, err error) {
	key, keyPEM, err := newKey()
	if err != nil {
		return nil, nil, err
	}
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.BasicConstraintsValid = true
	if err := complete(template); err != nil {
		return nil, nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.certificate, key.Public(), a.key)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot issue a certificate for %q: %w", template.Subject.CommonName, err)
	}
	return encodeCertificate(der), keyPEM, nil
}

// newCSR creates a CSR with a key that is not stored.
func newCSR(name string) ([]byte, error) {
	key, _, err := newKey()
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: []string{name}}, key)
	if err != nil {
		return nil, fmt.Errorf("cannot create a CSR: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), nil
}

// complete sets the fields that all certificates here have in common.
func complete(template *x509.Certificate) error {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return fmt.Errorf("cannot draw a serial number: %w", err)
	}
	template.SerialNumber = serial.Add(serial, big.NewInt(1))
	template.NotBefore = time.Now().Add(-5 * time.Minute)
	template.NotAfter = template.NotBefore.Add(tenYears)
	return nil
}

func newKey() (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot generate a key: %w", err)
	}
	encoded, err := encodeKey(key)
	return key, encoded, err
}

func encodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("cannot encode a key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func encodeCertificate(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}
