//! Private keys for tests, in every form in which they may occur in a text.
#![allow(clippy::unwrap_used, reason = "for tests alone")]

use std::collections::HashSet;

use aws_lc_rs::{encoding::AsDer, rsa};
use base64::{
    Engine,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};

/// A private key, and every form in which it may occur in a text.
pub struct Key {
    /// The key as PKCS#8 in PEM.
    pub pem: String,
    der: Vec<u8>,
    windows: HashSet<String>,
}

/// Maximum size of the text that may be shown for one error.
const MAX_BYTES: usize = 4096;
/// Number of consecutive characters of a key that count as a leak.
const WINDOW: usize = 12;
/// The first line of the PEM text, which is not secret.
const MARK: &str = "-----BEGIN PRIVATE KEY-----";

impl Key {
    /// Generates an ECDSA key, as agents and most CAs use.
    pub fn ecdsa() -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        Self::new(key.serialize_pem(), key.serialize_der())
    }

    /// Generates an RSA key, as some CAs use.
    pub fn rsa() -> Self {
        let der = rsa::KeyPair::generate(rsa::KeySize::Rsa2048).unwrap();
        let der: aws_lc_rs::encoding::Pkcs8V1Der<'_> = der.as_der().unwrap();
        let der = der.as_ref().to_vec();
        let pair = rcgen::KeyPair::from_pkcs8_der_and_sign_algo(&der.clone().into(), &rcgen::PKCS_RSA_SHA256).unwrap();
        Self::new(pair.serialize_pem(), der)
    }

    fn new(pem: String, der: Vec<u8>) -> Self {
        let windows = windows(&pem, &der);
        Self { pem, der, windows }
    }

    /// The lines of base64.
    fn lines(&self) -> Vec<&str> {
        self.pem.lines().filter(|line| !line.starts_with('-')).collect()
    }

    fn body(&self) -> String {
        self.lines().concat()
    }

    /// The key as the content of a source, with or without a root certificate, valid or broken.
    pub fn inputs(&self) -> Vec<(&'static str, String)> {
        let root = rcgen::CertificateParams::new(Vec::new()).unwrap().self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem();
        let (pem, both) = (self.pem.clone(), self.pem.clone() + &root);
        let one_line = |text: &str| text.lines().collect::<Vec<_>>().join(" ");
        let literal = |text: &str| text.replace('\n', "\\n");
        vec![
            ("a key", pem.clone()),
            ("a key and a root", both.clone()),
            ("a root and a key", root.clone() + &pem),
            ("one line, blanks", one_line(&both)),
            ("one line, literal line ends", literal(&both)),
            ("one line, without anything between", both.replace('\n', "")),
            ("literal line ends, twice escaped", literal(&both).replace('\\', "\\\\")),
            ("BEGIN without END", pem.lines().take(3).collect::<Vec<_>>().join("\n")),
            ("END without BEGIN", pem.lines().skip(1).collect::<Vec<_>>().join("\n")),
            ("another END", pem.replace("END PRIVATE KEY", "END CERTIFICATE")),
            ("labelled as a certificate", pem.replace("PRIVATE KEY", "CERTIFICATE")),
            ("labelled as a list", pem.replace("PRIVATE KEY", "X509 CRL")),
            ("labelled as a certificate, one line", one_line(&pem.replace("PRIVATE KEY", "CERTIFICATE"))),
            ("BEGIN without its end", pem.replace("KEY-----", "KEY--")),
            ("no marks", self.lines().join("\n")),
            ("a megabyte on one line", one_line(&both).repeat(2000)),
        ]
    }

    /// The key as quoted in messages of a server or a client.
    pub fn texts(&self) -> Vec<(&'static str, String)> {
        let list = |bytes: &[u8], format: fn(u8) -> String, between: &str| {
            bytes.iter().map(|byte| format(*byte)).collect::<Vec<_>>().join(between)
        };
        let wrapped = |width: usize, between: &str| {
            let body = self.body();
            let lines: Vec<_> = body.as_bytes().chunks(width).map(|line| std::str::from_utf8(line).unwrap()).collect();
            lines.join(between)
        };
        let quoted = format!("{:?}", self.pem);
        let decimal: fn(u8) -> String = |byte| byte.to_string();
        let mut texts = self.inputs();
        texts.extend([
            ("quoted", quoted.clone()),
            ("quoted twice", format!("{quoted:?}")),
            ("indented", self.pem.replace('\n', "\n    ")),
            ("quoted by lines", self.pem.replace('\n', "\n> ")),
            ("numbered lines", self.lines().iter().enumerate().fold(String::new(), |text, (at, line)| text + &format!("{at}: {line}\n"))),
            ("CRLF", self.pem.replace('\n', "\r\n")),
            ("one line of base64", self.body()),
            ("base64 of PEM", STANDARD.encode(&self.pem)),
            ("base64url", URL_SAFE_NO_PAD.encode(&self.der)),
            ("percent-encoded", self.body().replace('+', "%2B").replace('/', "%2F").replace('=', "%3D")),
            ("JSON with escaped slashes", self.body().replace('/', "\\/").replace('+', "\\u002b").replace('=', "\\u003d")),
            ("16 columns", wrapped(16, "\n")),
            ("32 columns, blanks", wrapped(32, " ")),
            ("32 columns, literal", wrapped(32, "\\n")),
            ("20 columns as a list", wrapped(20, "\", \"")),
            ("hexadecimal", list(&self.der, |byte| format!("{byte:02x}"), "")),
            ("HEXADECIMAL", list(&self.der, |byte| format!("{byte:02X}"), "")),
            ("pairs", list(&self.der, |byte| format!("{byte:02x}"), ":")),
            ("pairs, blanks", list(&self.der, |byte| format!("{byte:02X}"), " ")),
            ("0x", list(&self.der, |byte| format!("0x{byte:02x}"), ", ")),
            ("\\x", list(&self.der, |byte| format!("\\x{byte:02x}"), "")),
            ("numbers", format!("illegal section start: {:?}", self.pem.as_bytes())),
            ("numbers of DER", format!("Bytes({:?})", self.der)),
            ("numbers without blanks", list(self.pem.as_bytes(), decimal, ",")),
            ("numbers with blanks alone", list(self.pem.as_bytes(), decimal, " ")),
            ("numbers on lines", list(self.pem.as_bytes(), decimal, ",\n\t")),
        ]);
        // Truncated texts contain only a part of the key.
        for at in [1, 7, 30, 50, 90, 130] {
            texts.push(("cut at its beginning", self.pem[at..].to_owned()));
            texts.push(("cut at its end", self.pem[..self.pem.len() - at].to_owned()));
        }
        let around = |text: &str| format!("admission webhook \"a.b\" denied the request: {text}: the issuer, at 10.0.0.1, said so");
        texts.iter().map(|(name, text)| (*name, around(text))).chain(texts.iter().cloned()).collect()
    }

    /// A selection of the texts, for tests that are slow for each of them.
    pub fn some_texts(&self) -> impl Iterator<Item = (&'static str, String)> {
        self.texts().into_iter().filter(|(name, _)| !name.contains("megabyte")).step_by(4)
    }

    /// Returns a part of the key that `text` contains in any form, with or without white space; `None` if it contains none.
    pub fn leak_in(&self, text: &str) -> Option<String> {
        let squeezed: String = text.split_whitespace().collect();
        let look = |text: &str| {
            let pieces = (0..text.len().saturating_sub(WINDOW - 1)).filter_map(|at| text.get(at..at + WINDOW));
            pieces.filter(|piece| self.windows.contains(*piece)).map(str::to_owned).next()
        };
        look(text).or_else(|| look(&squeezed))
    }

    /// Panics if the text `shown`, derived from `what`, contains a part of the key or exceeds 4 KiB.
    pub fn assert_tame(&self, what: &str, shown: &str) {
        assert_eq!(self.leak_in(shown), None, "{what}: {shown}");
        assert!(shown.len() < MAX_BYTES, "{what}: {} bytes", shown.len());
    }
}

/// All substrings of `WINDOW` characters, for each form of the key.
fn windows(pem: &str, der: &[u8]) -> HashSet<String> {
    let body: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
    let numbers = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte}, ")).collect::<String>();
    let forms = [
        body,
        STANDARD.encode(pem),
        URL_SAFE_NO_PAD.encode(der),
        der.iter().map(|byte| format!("{byte:02x}")).collect(),
        der.iter().map(|byte| format!("{byte:02X}")).collect(),
        numbers(&pem.as_bytes()[MARK.len()..]),
        numbers(der),
    ];
    let squeezed = forms.each_ref().map(|form| form.replace(' ', ""));
    let all = forms.iter().chain(&squeezed).flat_map(|form| form.as_bytes().windows(WINDOW));
    all.map(|window| String::from_utf8(window.to_vec()).unwrap()).collect()
}
