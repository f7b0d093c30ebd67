//! Properties of any CSR in a CertificateRequest. An input is DER, or PEM as in a request.

use cert_manager::{Csr, csr};
use x509_parser::{
    certification_request::X509CertificationRequest,
    extensions::{GeneralName, ParsedExtension},
    prelude::FromDer,
};

/// Panics if a second parser reads the request differently.
pub fn check(data: &[u8]) {
    if let Some(pem) = Csr::from_der(data).pem() {
        let read = csr::read(&pem);
        if let Ok(asked) = &read {
            compare(data, asked);
        }
        // A request has exactly one encoding.
        let longer = Csr::from_der(&[data, &[0]].concat()).pem().unwrap_or_default();
        assert!(csr::read(&longer).is_err(), "what follows is not looked at");
        let twice = [&pem[..], &pem[..]].concat();
        assert!(csr::read(&twice).is_err(), "what follows is not looked at");
    }
    if let Ok(asked) = csr::read(data) {
        let (_, pem) = x509_parser::pem::parse_x509_pem(data).expect("what is read is PEM");
        assert_eq!(csr::read(&Csr::from_der(&pem.contents).pem().unwrap_or_default()), Ok(asked));
    }
}

fn compare(der: &[u8], asked: &csr::Asked) {
    let (rest, request) = X509CertificationRequest::from_der(der).expect("another reader reads it too");
    assert!(rest.is_empty());
    assert_eq!(request.certification_request_info.subject.iter_rdn().count(), 0, "a subject");
    let extensions: Vec<_> = request.requested_extensions().expect("it requests names").collect();
    let [ParsedExtension::SubjectAlternativeName(names)] = &extensions[..] else { panic!("other extensions: {extensions:?}") };
    let (mut uris, mut dns_names) = (Vec::new(), Vec::new());
    for name in &names.general_names {
        match name {
            GeneralName::URI(uri) => uris.push((*uri).to_owned()),
            GeneralName::DNSName(name) => dns_names.push((*name).to_owned()),
            other => panic!("another kind of name: {other:?}"),
        }
    }
    assert_eq!((uris, &dns_names), (vec![asked.uri.clone()], &asked.dns_names));
}
