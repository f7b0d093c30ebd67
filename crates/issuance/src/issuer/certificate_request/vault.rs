//! Explains errors of a Vault behind cert-manager from the status of a request, and names the fix. It only parses text.
//!
//! The texts are those of Vault's PKI secrets engine (OpenBao has the same), of Vault's HTTP API, and of cert-manager's Vault issuer, which
//! wraps them. If a role cannot serve, the order waits for the operator. If Vault does not answer, the order is retried after the usual
//! backoff. An unknown error is not explained, and is retried too.

use std::fmt;

use agent_runtime::text;

use crate::issuer::Retry;

/// Maximum length of a mount or a role in bytes. A longer one is not named.
const MAX_PATH_BYTES: usize = 100;
/// Beginning of cert-manager's message after signing has finally failed.
const SIGNING: &str = "Vault failed to sign certificate";
/// Beginnings of cert-manager's messages after a failed login, in a request and in the issuer. cert-manager retries the login.
const LOGIN: [&str; 3] = [
    "Failed to initialise vault client for signing",
    "Failed to initialize Vault client",
    "Failed to verify Vault is initialized and unsealed",
];

/// An explained failure. `Display` writes it as one sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The failure, and the program that reports it.
    pub said: String,
    /// The fix.
    pub remedy: String,
    /// When to retry.
    pub retry: Retry,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.said, self.remedy)
    }
}

/// Explains the `message` of a condition. `None` if it is not of a Vault, or is unknown. `trust_domain` is the agent's.
pub fn explain(message: &str, trust_domain: &str) -> Option<Finding> {
    let at_login = LOGIN.iter().any(|beginning| message.starts_with(beginning));
    if !at_login && !message.starts_with(SIGNING) {
        return None;
    }
    let words = errors(message);
    if !at_login && let Some(refusal) = Refusal::of(&words) {
        let role = Role::of(message);
        let place = role.as_ref().map_or_else(|| "Vault's role".to_owned(), |role| format!("Vault's role {}", role.path()));
        let said = format!("{place} refuses the request ({words:?})");
        return Some(Finding { said, remedy: refusal.remedy(role.as_ref(), trust_domain), retry: Retry::Configuration });
    }
    let (what, remedy) = trouble(message, &words, at_login)?;
    let doing = if at_login { "log in to Vault" } else { "have Vault sign" };
    Some(Finding { said: format!("cert-manager could not {doing}: {what}"), remedy, retry: Retry::Backoff })
}

/// Why a role does not sign. The agent's CSRs have an empty subject, one URI name, possibly DNS names, and a key of the profile's type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    Uri,
    CommonName,
    KeyType,
    DnsName,
    Role,
    Outlives,
}

impl Refusal {
    fn of(words: &str) -> Option<Self> {
        let known = [
            ("URI Subject Alternative Names are not allowed in this role", Self::Uri),
            // "… were provided via CSR which …" and "… via the API which …"
            ("URI Subject Alternative Names were provided via", Self::Uri),
            ("the common_name field is required", Self::CommonName),
            ("role requires keys of type", Self::KeyType),
            ("role requires a minimum of a", Self::KeyType),
            ("subject alternate name", Self::DnsName),
            ("unknown role:", Self::Role),
            ("cannot satisfy request, as TTL would result in notAfter of", Self::Outlives),
        ];
        known.iter().find(|(beginning, _)| words.starts_with(beginning)).map(|(_, refusal)| *refusal)
    }

    /// Vault reports one refusal at a time, so that the remedy names every setting that a role for SPIFFE needs.
    fn remedy(self, role: Option<&Role>, trust_domain: &str) -> String {
        let uris = format!("allowed_uri_sans=\"spiffe://{trust_domain}/*\"");
        let path = role.map_or_else(|| "pki/roles/ROLE".to_owned(), Role::path);
        let lacks = match self {
            Self::Uri => uris.as_str(),
            Self::CommonName => "require_cn=false",
            Self::KeyType => "key_type=any",
            Self::DnsName => {
                return format!(
                    "the role must allow the DNS names of identity.dnsNames (allowed_domains with allow_subdomains or allow_glob_domains, or \
                     allow_any_name): vault patch {path} allowed_domains=… allow_subdomains=true"
                );
            }
            Self::Role => {
                return format!(
                    "make the role (vault write {path} {uris} key_type=any require_cn=false), or correct spec.vault.path of the issuer"
                );
            }
            Self::Outlives => {
                return "the CA's certificate in Vault ends before the asked lifetime does: replace it, ask for less (certificate.lifetime), \
                        or set leaf_not_after_behavior=truncate on that issuer"
                    .to_owned();
            }
        };
        format!(
            "the role lacks {lacks}; for SPIFFE it needs all of these: vault patch {path} {uris} key_type=any require_cn=false (and \
             max_ttl no shorter than certificate.lifetime)"
        )
    }
}

/// Explains a failure of Vault, or of cert-manager on the way to it. Returns the finding and the fix.
fn trouble(message: &str, words: &str, at_login: bool) -> Option<(String, String)> {
    let quoted = || format!("{words:?}");
    let found = if words.contains("Vault is sealed") {
        (quoted(), "unseal it; this is tried again".to_owned())
    } else if words.contains("permission denied") {
        let remedy = if at_login {
            "its auth method refuses cert-manager's service account: see bound_service_account_names, bound_service_account_namespaces and \
             audience of the auth role, and that Vault may review tokens (system:auth-delegator)"
        } else {
            "the policy of the auth role must allow create and update on spec.vault.path of the issuer"
        };
        (quoted(), remedy.to_owned())
    } else if words.starts_with("invalid role name") {
        (quoted(), "make the role of the auth method that spec.vault.auth.kubernetes.role of the issuer names".to_owned())
    } else if words.contains("could not fetch the CA certificate") {
        (quoted(), "the PKI mount has no CA yet: generate or import one".to_owned())
    } else if words.starts_with("no handler for route") {
        (quoted(), "nothing is mounted there: correct spec.vault.path or the auth mount path of the issuer".to_owned())
    } else if words.contains("service account") && at_login && words.contains("not authorized") {
        (quoted(), "bind the auth role to cert-manager's service account (bound_service_account_names and …_namespaces)".to_owned())
    } else if message.contains("while requesting a token for the service account") {
        (
            last_words(message),
            "allow cert-manager to create serviceaccounts/token of the account that the issuer's serviceAccountRef names".to_owned(),
        )
    } else if message.contains("which is not a Vault error response") {
        (last_words(message), "another server answered instead of Vault; this is tried again".to_owned())
    } else if ["connection refused", "connection reset", "no such host", "i/o timeout", "deadline exceeded", "EOF", "no route to host"]
        .iter()
        .any(|sign| message.contains(sign))
    {
        (
            format!("it does not answer ({})", last_words(message)),
            "check that Vault runs and that spec.vault.server is right; this is tried again".to_owned(),
        )
    } else if message.contains("x509:") || message.contains("tls:") {
        (last_words(message), "set spec.vault.caBundle or caBundleSecretRef to the CA of Vault's own certificate".to_owned())
    } else if let Some(code @ 500..) = code(message) {
        (format!("status {code}, {words:?}"), "see Vault's log; this is tried again".to_owned())
    } else {
        return None;
    };
    Some(found)
}

/// A PKI role, from the URL that cert-manager called.
#[derive(Debug, PartialEq, Eq)]
struct Role {
    mount: String,
    name: String,
}

impl Role {
    /// Parses `URL: POST https://vault/v1/pki/sign/mesh` or `…/v1/pki/issuer/NAME/sign/mesh`.
    fn of(message: &str) -> Option<Self> {
        let url = message.lines().find_map(|line| line.strip_prefix("URL: "))?;
        let (_, path) = url.split_once("/v1/")?;
        let (mount, name) = path.rsplit_once("/sign/")?;
        let mount = mount.rsplit_once("/issuer/").map_or(mount, |(mount, _)| mount);
        let is_plain = |text: &str| {
            !text.is_empty() && text.len() <= MAX_PATH_BYTES && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"/_-.".contains(&b))
        };
        (is_plain(mount) && is_plain(name)).then(|| Self { mount: mount.to_owned(), name: name.to_owned() })
    }

    fn path(&self) -> String {
        format!("{}/roles/{}", self.mount, self.name)
    }
}

/// Returns the entries of Vault's list of errors. Its client writes `Code: 400. Errors:`, an empty line, and `* ` before each entry.
fn errors(message: &str) -> String {
    let Some((_, list)) = message.split_once("Errors:") else { return String::new() };
    let list = list.lines().filter_map(|line| line.trim().strip_prefix("* ")).collect::<Vec<_>>().join("; ");
    text::excerpt(&list, text::MAX_MESSAGE_CHARS)
}

fn code(message: &str) -> Option<u16> {
    message.lines().find_map(|line| line.strip_prefix("Code: ")?.split('.').next()?.parse().ok())
}

/// Returns the last three parts of a Go error's chain, on one line.
fn last_words(message: &str) -> String {
    let line = message.lines().next_back().unwrap_or_default().trim();
    let start = line.rmatch_indices(": ").nth(2).map_or(0, |(at, separator)| at + separator.len());
    text::excerpt(&line[start..], text::MAX_MESSAGE_CHARS)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As cert-manager 1.21 writes it.
    fn signing(path: &str, code: u16, error: &str) -> String {
        format!(
            "Vault failed to sign certificate: failed to sign certificate by vault: Error making API request.\n\n\
             URL: POST https://vault.vault:8200/v1/{path}\nCode: {code}. Errors:\n\n* {error}"
        )
    }

    fn login(code: u16, error: &str) -> String {
        format!(
            "Failed to initialise vault client for signing: while requesting a Vault token using the Kubernetes auth: error calling Vault \
             server: Error making API request.\n\nURL: POST https://vault.vault:8200/v1/auth/kubernetes/login\nCode: {code}. Errors:\n\n\
             * {error}"
        )
    }

    #[test]
    fn a_roles_refusal_names_what_it_lacks_and_waits_for_its_operator() {
        let all = "vault patch pki/roles/seed allowed_uri_sans=\"spiffe://example.org/*\" key_type=any require_cn=false";
        for (error, lacks) in [
            (
                "URI Subject Alternative Names are not allowed in this role, but were provided via CSR",
                "allowed_uri_sans=\"spiffe://example.org/*\"",
            ),
            (
                "URI Subject Alternative Names were provided via CSR which are not valid for this role",
                "allowed_uri_sans=\"spiffe://example.org/*\"",
            ),
            (
                "URI Subject Alternative Names were provided via the API which are not valid for this role",
                "allowed_uri_sans=\"spiffe://example.org/*\"",
            ),
            (
                "the common_name field is required, or must be provided in a CSR with \"use_csr_common_name\" set to true, unless \
                 \"require_cn\" is set to false",
                "require_cn=false",
            ),
            ("role requires keys of type rsa", "key_type=any"),
            ("role requires a minimum of a 384-bit key, but CSR's key is 256 bits", "key_type=any"),
        ] {
            let finding = explain(&signing("pki/sign/seed", 400, error), "example.org").unwrap();
            assert!(finding.remedy.starts_with(&format!("the role lacks {lacks};")), "{finding}");
            assert!(finding.remedy.contains(all) && finding.said.starts_with("Vault's role pki/roles/seed refuses"), "{finding}");
            assert_eq!(finding.retry, Retry::Configuration);
            assert!(!finding.to_string().contains('\n'), "{finding}");
        }
        for (error, remedy) in [
            ("subject alternate name cart.shop.svc not allowed by this role", "identity.dnsNames"),
            ("unknown role: seed", "make the role (vault write pki/roles/seed"),
            (
                "cannot satisfy request, as TTL would result in notAfter of 2030-01-01T00:00:00Z that is beyond the expiration of the CA \
                 certificate at 2029-01-01T00:00:00Z",
                "certificate.lifetime",
            ),
        ] {
            let finding = explain(&signing("pki/sign/seed", 400, error), "example.org").unwrap();
            assert!(finding.remedy.contains(remedy), "{finding}");
            assert_eq!(finding.retry, Retry::Configuration);
        }
    }

    #[test]
    fn the_role_is_where_the_issuers_path_says() {
        let role = |path: &str| Role::of(&signing(path, 400, "x")).map(|role| role.path());
        assert_eq!(role("pki/sign/mesh").as_deref(), Some("pki/roles/mesh"));
        assert_eq!(role("team/a/pki_int/issuer/2030/sign/mesh").as_deref(), Some("team/a/pki_int/roles/mesh"));
        for none in ["pki/sign-verbatim", "pki/sign/", "pki/sign/a b", "pki/sign/$(x)"] {
            assert_eq!(role(none), None, "{none}");
        }
        let finding = explain(&signing("pki/sign-verbatim", 400, "role requires keys of type rsa"), "a.b").unwrap();
        assert!(finding.remedy.contains("vault patch pki/roles/ROLE"), "{finding}");
    }

    #[test]
    fn a_vault_that_does_not_answer_is_tried_again() {
        let refused = "Post \"http://127.0.0.1:8200/v1/pki/sign/mesh\": dial tcp 127.0.0.1:8200: connect: connection refused";
        let proxy =
            "the Vault server returned an HTTP 502 response which is not a Vault error response; the response body has been omitted";
        for (message, words) in [
            (format!("{SIGNING}: failed to sign certificate by vault: {refused}"), "connect: connection refused"),
            (format!("{SIGNING}: failed to sign certificate by vault: Post \"http://x/v1/pki/sign/mesh\": EOF"), "EOF"),
            (format!("{}: while requesting a Vault token: error calling Vault server: {refused}", LOGIN[0]), "could not log in to Vault"),
            (format!("{SIGNING}: {proxy}"), "HTTP 502"),
            (signing("pki/sign/mesh", 503, "Vault is sealed"), "unseal it"),
            (signing("pki/sign/mesh", 403, "permission denied"), "create and update on spec.vault.path"),
            (signing("pki/sign/mesh", 500, "internal error"), "status 500"),
            (login(403, "permission denied"), "bound_service_account_names"),
            (login(403, "service account name not authorized"), "bound_service_account_names"),
            (login(400, "invalid role name \"x\""), "spec.vault.auth.kubernetes.role"),
            (login(404, "no handler for route \"auth/k8s/login\". route entry not found."), "nothing is mounted there"),
            (
                format!("{}: while requesting a token for the service account /vault-issuer: serviceaccounts \"x\" is forbidden", LOGIN[0]),
                "serviceaccounts/token",
            ),
            (
                format!("{}: error calling Vault server: Post \"https://v\": tls: failed to verify certificate: x509: unknown", LOGIN[1]),
                "caBundle",
            ),
        ] {
            let finding = explain(&message, "example.org").unwrap_or_else(|| panic!("{message}"));
            assert_eq!(finding.retry, Retry::Backoff, "{finding}");
            assert!(finding.to_string().contains(words) && !finding.to_string().contains('\n'), "{finding}");
        }
    }

    #[test]
    fn what_is_not_known_is_not_explained() {
        for message in [
            "",
            "the signer is out of ink",
            "the role requires keys of type rsa",
            &signing("pki/sign/mesh", 400, "something new"),
            // A login error never concerns the role of the PKI engine.
            &login(400, "unknown role: x"),
        ] {
            assert_eq!(explain(message, "example.org"), None, "{message}");
        }
    }
}
