//! Claims of the program's own service account token. The API server verifies tokens; here one is only read, to label objects.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use kube::Config;
use secrecy::ExposeSecret;
use serde::Deserialize;

/// Maximum length of a token that is read, 64 KiB.
const MAX_TOKEN_BYTES: usize = 64 << 10;

/// Returns the UID of the node that the token of this process names, or `None` if there is no token, or it names no node. Such a token
/// belongs to no pod, or comes from an API server older than Kubernetes 1.30.
pub async fn node_uid() -> Option<String> {
    let auth = Config::infer().await.ok()?.auth_info;
    let token = match (&auth.token, &auth.token_file) {
        (Some(token), _) => token.expose_secret().to_owned(),
        (None, Some(file)) => String::from_utf8(agent_runtime::file::read(file.as_ref(), MAX_TOKEN_BYTES).ok()?).ok()?,
        (None, None) => return None,
    };
    node_uid_in(token.trim())
}

fn node_uid_in(token: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Claims {
        #[serde(rename = "kubernetes.io")]
        kubernetes: Kubernetes,
    }
    #[derive(Deserialize)]
    struct Kubernetes {
        node: Node,
    }
    #[derive(Deserialize)]
    struct Node {
        uid: String,
    }
    let mut parts = token.split('.');
    let (_header, claims, _signature) = (parts.next()?, parts.next()?, parts.next()?);
    let claims: Claims = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).ok()?).ok()?;
    // A label has at most 63 characters.
    Some(claims.kubernetes.node.uid).filter(|uid| !uid.is_empty() && uid.len() <= 63)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn token(claims: &Value) -> String {
        format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims.to_string()))
    }

    #[test]
    fn the_node_is_read_from_the_claims_of_a_pods_token() {
        let claims = json!({"sub": "system:serviceaccount:a:b", "kubernetes.io": {"namespace": "a", "node": {"name": "n1", "uid": "u-1"}}});
        assert_eq!(node_uid_in(&token(&claims)), Some("u-1".to_owned()));
        for other in [
            json!({"kubernetes.io": {"namespace": "a", "pod": {"name": "p", "uid": "u"}}}),
            json!({"kubernetes.io": {"node": {"name": "n1"}}}),
            json!({"kubernetes.io": {"node": {"name": "n1", "uid": ""}}}),
            json!({"kubernetes.io": {"node": {"name": "n1", "uid": "u".repeat(64)}}}),
            json!([]),
        ] {
            assert_eq!(node_uid_in(&token(&other)), None, "{other}");
        }
        for text in ["", "a.b", "a.b.c", "opaque-token", "e30.e30.e30"] {
            assert_eq!(node_uid_in(text), None, "{text}");
        }
    }
}
