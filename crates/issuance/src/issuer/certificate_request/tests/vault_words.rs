//! How an order handles the messages of a Vault behind cert-manager.

use super::*;

const FAILED: &str = "Vault failed to sign certificate: failed to sign certificate by vault: ";

#[tokio::test(start_paused = true)]
async fn a_roles_refusal_waits_for_its_operator_and_a_cut_line_does_not() {
    let refusal =
        "Error making API request.\n\nURL: POST https://v:8200/v1/pki/sign/seed\nCode: 400. Errors:\n\n* role requires keys of type rsa";
    let cut = "Post \"https://v:8200/v1/pki/sign/seed\": EOF";
    for (words, retry, told) in [
        (
            refusal,
            Retry::Configuration,
            "Vault's role pki/roles/seed refuses the request (\"role requires keys of type rsa\"): the role lacks",
        ),
        (cut, Retry::Backoff, "cert-manager could not have Vault sign: it does not answer"),
        ("something new", Retry::Backoff, "Vault failed to sign certificate: failed to sign certificate by vault: something new"),
    ] {
        let world = World::new();
        let (task, _) = world.order("cart");
        let request = world.request().await;
        world.says(&request, "Ready", "False", "Failed", &format!("{FAILED}{words}"));
        let error = end(task).await.unwrap_err();
        assert_eq!(error.retry(), retry, "{error}");
        assert!(error.to_string().contains(told) && error.to_string().contains("kubectl describe certificaterequest"), "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_request_that_waits_for_a_login_is_not_given_up() {
    let world = World::new();
    let (mut task, _) = world.order("cart");
    let request = world.request().await;
    world.condition(&request, "Approved", "True", "cert-manager.io");
    world.says(&request, "Ready", "False", "Pending", "Failed to initialise vault client for signing: dial tcp: connection refused");
    assert!(timeout(61 * MINUTE, &mut task).await.is_err());
    world.issue(&request);
    end(task).await.unwrap();
}
