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
    /// Each group of consecutive bytes of the PKCS#8 document, and so of the scalar, without those that all keys of the type have.
    windows: HashSet<[u8; WINDOW]>,
}

/// Maximum size of the text that may be shown for one error.
const MAX_BYTES: usize = 4096;
/// Number of consecutive bytes of a key that count as a leak.
const WINDOW: usize = 8;
/// Encodings that may be within each other, such as base64 of PEM as a list of numbers.
const LAYERS: usize = 2;

impl Key {
    /// Generates an ECDSA key, as agents and most CAs use.
    pub fn ecdsa() -> Self {
        let (key, other) = (rcgen::KeyPair::generate().unwrap(), rcgen::KeyPair::generate().unwrap());
        Self::new(key.serialize_pem(), key.serialize_der(), &other.serialize_der())
    }

    /// Generates an RSA key, as some CAs use.
    pub fn rsa() -> Self {
        let generate = || {
            let der = rsa::KeyPair::generate(rsa::KeySize::Rsa2048).unwrap();
            let der: aws_lc_rs::encoding::Pkcs8V1Der<'_> = der.as_der().unwrap();
            der.as_ref().to_vec()
        };
        let (der, other) = (generate(), generate());
        let pair = rcgen::KeyPair::from_pkcs8_der_and_sign_algo(&der.clone().into(), &rcgen::PKCS_RSA_SHA256).unwrap();
        Self::new(pair.serialize_pem(), der, &other)
    }

    fn new(pem: String, der: Vec<u8>, other: &[u8]) -> Self {
        let common: HashSet<_> = groups(other).collect();
        let windows = groups(&der).filter(|group| !common.contains(group)).collect();
        Self { pem, der, windows }
    }

    /// The groups of eight bytes that count as a leak.
    pub fn secret_groups(&self) -> impl Iterator<Item = [u8; WINDOW]> {
        self.windows.iter().copied()
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

    /// Returns the encoding of a part of the key that `text` contains: eight bytes of it in any form. `None` if it contains none.
    pub fn leak_in(&self, text: &str) -> Option<String> {
        self.leak_in_bytes(text.as_bytes())
    }

    /// Like [`leak_in`](Self::leak_in), for an output that need not be text.
    pub fn leak_in_bytes(&self, output: &[u8]) -> Option<String> {
        self.leak_in_layer(output, LAYERS).map(|forms| forms.join(" of "))
    }

    fn leak_in_layer(&self, output: &[u8], layers: usize) -> Option<Vec<&'static str>> {
        if groups(output).any(|group| self.windows.contains(&group)) {
            return Some(vec!["raw bytes"]);
        }
        if layers == 0 {
            return None;
        }
        DECODERS.iter().find_map(|(name, decode)| {
            let decoded = decode(output);
            decoded.iter().find_map(|bytes| self.leak_in_layer(bytes, layers - 1)).map(|mut forms| {
                forms.push(name);
                forms
            })
        })
    }

    /// Panics if the text `shown`, derived from `what`, contains a part of the key or exceeds 4 KiB.
    pub fn assert_tame(&self, what: &str, shown: &str) {
        assert_eq!(self.leak_in(shown), None, "{what}: {shown}");
        assert!(shown.len() < MAX_BYTES, "{what}: {} bytes", shown.len());
    }
}

fn groups(bytes: &[u8]) -> impl Iterator<Item = [u8; WINDOW]> {
    bytes.windows(WINDOW).filter_map(|group| group.try_into().ok())
}

/// Returns the byte strings that a text may encode.
type Decode = fn(&[u8]) -> Vec<Vec<u8>>;

const DECODERS: [(&str, Decode); 4] = [("decimal", decimal), ("hexadecimal", hexadecimal), ("percent", percent), ("base64", base64)];

/// Runs of numbers up to 255, with anything but letters between.
fn decimal(text: &[u8]) -> Vec<Vec<u8>> {
    let mut runs = vec![Vec::new()];
    for run in text.split(u8::is_ascii_alphabetic) {
        for number in run.split(|byte| !byte.is_ascii_digit()).filter(|number| !number.is_empty()) {
            match std::str::from_utf8(number).ok().and_then(|number| number.parse().ok()) {
                Some(byte) => runs.last_mut().unwrap().push(byte),
                None => runs.push(Vec::new()),
            }
        }
        runs.push(Vec::new());
    }
    long(runs)
}

/// Runs of digits, also with separators and prefixes between pairs; at both alignments.
fn hexadecimal(text: &[u8]) -> Vec<Vec<u8>> {
    let text: String = text.iter().copied().map(char::from).collect();
    let text = text.replace("0x", "").replace("\\x", "");
    let digits = |separators: &[char]| -> Vec<Vec<u8>> {
        let text: String = text.chars().filter(|c| !separators.contains(c) && !c.is_whitespace()).collect();
        text.split(|c: char| !c.is_ascii_hexdigit()).map(|run| run.bytes().collect()).collect()
    };
    let value = |digit: &u8| char::from(*digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok()).unwrap_or(0);
    let pairs = |run: &[u8]| run.chunks_exact(2).map(|pair| value(&pair[0]) << 4 | value(&pair[1])).collect::<Vec<u8>>();
    let runs = [digits(&[]), digits(&[':', ',', '-'])].concat();
    long(runs.iter().flat_map(|run| [pairs(run), pairs(run.get(1..).unwrap_or_default())]).collect())
}

/// The text with `%xx`, `\\xxx` and `\\u00xx` replaced by their bytes, and without the backslashes before other characters.
fn percent(text: &[u8]) -> Vec<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        let escape = [&b"%"[..], b"\\x", b"\\u00"].into_iter().find_map(|mark| {
            let digits = rest.strip_prefix(mark)?.get(..2)?;
            let byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
            Some((byte, mark.len() + 2))
        });
        match escape {
            Some((byte, len)) => {
                out.push(byte);
                rest = &rest[len..];
            }
            // `\\n` of a quoted text is no character of it.
            None if *first == b'\\' => rest = tail.strip_prefix(b"n").or(tail.strip_prefix(b"r")).unwrap_or(tail),
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    if out == text { Vec::new() } else { vec![out] }
}

/// Runs of base64 and base64url, with white space or any other characters between lines; at all four alignments.
fn base64(text: &[u8]) -> Vec<Vec<u8>> {
    let is_digit = |byte: &u8| byte.is_ascii_alphanumeric() || b"+/-_".contains(byte);
    let squeezed: Vec<u8> = text.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let digits: Vec<u8> = text.iter().copied().filter(is_digit).collect();
    let mut decoded = Vec::new();
    for run in squeezed.split(|byte| !is_digit(byte)).chain(text.split(|byte| !is_digit(byte))).chain([&digits[..]]) {
        let run: Vec<u8> = run
            .iter()
            .map(|byte| {
                if *byte == b'-' {
                    b'+'
                } else if *byte == b'_' {
                    b'/'
                } else {
                    *byte
                }
            })
            .collect();
        for start in 0..4.min(run.len()) {
            let whole = &run[start..run.len() - (run.len() - start) % 4];
            decoded.extend(STANDARD.decode(whole).ok());
        }
    }
    long(decoded)
}

fn long(runs: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    runs.into_iter().filter(|run| run.len() >= WINDOW).collect()
}
