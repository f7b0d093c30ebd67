use base64::{Engine, engine::general_purpose::STANDARD};

use super::{test_keys::Key, *};

#[test]
fn no_part_of_a_key_is_left_in_whatever_form_it_comes() {
    for key in [Key::ecdsa(), Key::rsa(), Key::ecdsa(), Key::ecdsa()] {
        for (name, text) in key.texts() {
            for (how, shown) in [("excerpt", excerpt(&text, usize::MAX)), ("redact", redact(&text).into_owned())] {
                assert_eq!(key.leak_in(&shown), None, "{how} of {name}: {shown}");
            }
            let short = excerpt(&text, MAX_MESSAGE_CHARS);
            assert!(short.chars().count() <= MAX_MESSAGE_CHARS + 1 && !short.contains('\n'), "{short}");
        }
    }
}

/// Shows that `leak_in` finds a key in each form, so that the tests above do not pass without a check.
#[test]
fn a_key_is_found_where_it_is() {
    for key in [Key::ecdsa(), Key::rsa()] {
        for (name, text) in key.texts().into_iter().filter(|(name, _)| !name.contains("megabyte")) {
            assert!(key.leak_in(&text).is_some(), "{name}: {text}");
        }
    }
}

/// Eight bytes of a key are found in each form, wherever they begin.
#[test]
fn each_group_of_eight_bytes_is_found_in_each_form() {
    let (key, other) = (Key::ecdsa(), Key::ecdsa());
    let list = |bytes: &[u8], format: fn(&u8) -> String, between: &str| bytes.iter().map(format).collect::<Vec<_>>().join(between);
    for group in key.secret_groups() {
        let mut forms = vec![
            list(&group, |byte| format!("{byte:02x}"), ""),
            list(&group, |byte| format!("{byte:02X}"), ":"),
            list(&group, |byte| format!("{byte}"), ", "),
            list(&group, |byte| format!("%{byte:02X}"), ""),
            list(&group, |byte| format!("\\x{byte:02x}"), ""),
        ];
        for offset in 0..3 {
            let padded = [&vec![0; offset][..], &group, &[0; 3]].concat();
            forms.push(STANDARD.encode(padded));
        }
        for form in forms {
            let around = format!("a line with {form:?}, and more");
            assert!(key.leak_in(&around).is_some(), "{around}");
            assert_eq!(other.leak_in(&around), None, "{around}");
        }
        assert!(key.leak_in_bytes(&[b"raw: ", &group[..], b" end"].concat()).is_some());
    }
}

#[test]
fn what_people_need_is_left() {
    for text in [
        "certificaterequests.cert-manager.io \"sds-agent-0123456789abcdef-7f3f5d0e\" is forbidden: User \"system:serviceaccount:sds-agent:sds-agent\" \
         cannot create resource \"certificaterequests\" in API group \"cert-manager.io\" in the namespace \"shop\"",
        "ValidatingAdmissionPolicy 'sds-agent-requests' with binding 'sds-agent-requests' denied request: the node label is not yours",
        "exceeded quota: requests, requested: count/certificaterequests.cert-manager.io=1, used: 5, limited: 5",
        "Vault failed to sign certificate: failed to sign certificate by vault: Error making API request. URL: POST \
         https://vault.vault:8200/v1/pki_int/issuer/2030/sign/mesh Code: 400. Errors: * role requires keys of type rsa",
        "/var/lib/kubelet/pods/2b1fb2f4-4b5a-4b9a-9a4e-0c5a1b2c3d4e/volumes/kubernetes.io~csi/identity/mount",
        "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod2b1fb2f4_4b5a_4b9a_9a4e_0c5a1b2c3d4e.slice/cri-containerd.scope",
        "spiffe://cluster.local/ns/payments-and-invoices-of-the-shop/sa/a-service-account-with-a-long-name-of-its-own",
        "ValidatingAdmissionPolicyBinding/sds-agent-requests-of-everybody refers to ConfigMap/sds-agent",
        "dial tcp 10.96.0.1:443: connect: connection refused (fd00:10:96::1, 52:54:00:12:34:56)",
        "the serial number is 3d:9c:11:22:33:44:55",
        "system:node:ip-10-0-12-34.eu-west-1.compute.internal",
        "expected 3 items (1, 2, 3) at 2030-01-01T00:00:00Z",
        "größer als erlaubt; 証明書",
        "",
    ] {
        assert_eq!(excerpt(text, usize::MAX), text);
        assert_eq!(redact(text), text);
    }
}

#[test]
fn a_text_is_one_short_line_of_whole_characters() {
    assert_eq!(excerpt("  a\n\tb\u{1b}[2J\u{2028}c\u{202e}d  ", 100), "a b [2J c d");
    assert_eq!(excerpt(&"ü".repeat(1000), 100), "ü".repeat(100) + "…");
    assert_eq!(excerpt(&"ü".repeat(100), 100), "ü".repeat(100));
    assert_eq!(excerpt(&"xy ".repeat(1 << 20), usize::MAX).len(), MAX_READ_BYTES);
    assert_eq!(redact("a\nb"), "a\nb", "lines are kept");
}

#[test]
fn what_stands_around_a_key_is_left() {
    let key = Key::ecdsa();
    assert_eq!(excerpt(&format!("before it: {}after it", key.pem), 100), format!("before it: {REDACTED} after it"));
    assert_eq!(excerpt(&format!("got {:?}, expected a root", key.pem.as_bytes()), 100), format!("got [{REDACTED}], expected a root"));
    assert_eq!(
        excerpt(&format!("invalid value {:?} in ca.crt", STANDARD.encode(&key.pem)), 100),
        format!("invalid value \"{REDACTED}\" in ca.crt")
    );
}
