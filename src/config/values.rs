//! The parsers of single values, without side effects. An error does not repeat the value, because the reader shows it.

use std::{net::SocketAddr, ops::RangeInclusive, path::PathBuf, time::Duration};

use serde_json::Value;

use super::error::FieldError;

/// The longest socket path in bytes: the kernel accepts 107, and the agent first binds a longer temporary name in the same directory.
pub(super) const MAX_SOCKET_PATH_BYTES: usize = 100;

/// Text that is not empty and has no control characters.
pub(super) fn text(value: &Value) -> Result<&str, FieldError> {
    match value {
        Value::String(text) if text.is_empty() => Err(FieldError::new("is empty", "give it a value or leave the field out")),
        Value::String(text) if text.chars().any(char::is_control) => Err(FieldError::new("has control characters", "write it on one line")),
        Value::String(text) => Ok(text),
        Value::Number(_) | Value::Bool(_) => Err(FieldError::new("is not text", "put it in quotes")),
        _ => Err(FieldError::new("is not text", "write one value")),
    }
}

/// `true` or `false`.
pub(super) fn boolean(value: &Value) -> Result<bool, FieldError> {
    match value {
        Value::Bool(flag) => Ok(*flag),
        Value::String(text) if text == "true" => Ok(true),
        Value::String(text) if text == "false" => Ok(false),
        _ => Err(FieldError::new("is neither true nor false", "write true or false")),
    }
}

/// One of `names`.
pub(super) fn choice<T: Copy>(names: &[(&str, T)]) -> impl Fn(&Value) -> Result<T, FieldError> {
    move |value| {
        let found = value.as_str().and_then(|text| names.iter().find(|(name, _)| *name == text));
        found.map(|(_, choice)| *choice).ok_or_else(|| {
            let names: Vec<&str> = names.iter().map(|(name, _)| *name).collect();
            FieldError::new("is not a valid value", format!("use {}", one_of(&names)))
        })
    }
}

/// `a`, `a or b`, `a, b or c`.
pub(super) fn one_of(names: &[impl AsRef<str>]) -> String {
    let names: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
    match names.split_last() {
        None => String::new(),
        Some((last, [])) => (*last).to_owned(),
        Some((last, rest)) => format!("{} or {last}", rest.join(", ")),
    }
}

/// A duration with its unit.
pub(super) fn duration(range: RangeInclusive<Duration>) -> impl Fn(&Value) -> Result<Duration, FieldError> {
    move |value| {
        let example = "write a duration such as 24h, 5m or 90s";
        let text = match value {
            Value::String(text) => text,
            Value::Number(_) => return Err(FieldError::new("has no unit", example)),
            _ => return Err(FieldError::new("is not a duration", example)),
        };
        let duration = humantime::parse_duration(text).map_err(|_| FieldError::new("is not a duration", example))?;
        let say = |bound: &Duration| humantime::format_duration(*bound).to_string();
        match () {
            () if duration < *range.start() => Err(FieldError::new("is too short", format!("use at least {}", say(range.start())))),
            () if duration > *range.end() => Err(FieldError::new("is too long", format!("use at most {}", say(range.end())))),
            () => Ok(duration),
        }
    }
}

/// A whole number, with or without quotes.
pub(super) fn integer(range: RangeInclusive<u64>) -> impl Fn(&Value) -> Result<u64, FieldError> {
    move |value| {
        let number = match value {
            Value::Number(number) => number.as_u64(),
            Value::String(text) => text.parse().ok(),
            _ => None,
        };
        let remedy = || match (*range.start(), *range.end()) {
            (first, u64::MAX) => format!("use a whole number of at least {first}"),
            (first, last) => format!("use a whole number from {first} to {last}"),
        };
        let number = number.ok_or_else(|| FieldError::new("is not a valid whole number", remedy()))?;
        if range.contains(&number) { Ok(number) } else { Err(FieldError::new("is out of range", remedy())) }
    }
}

/// A share, such as 0.5, with or without quotes.
pub(super) fn fraction(range: RangeInclusive<f64>) -> impl Fn(&Value) -> Result<f64, FieldError> {
    move |value| {
        let number = match value {
            Value::Number(number) => number.as_f64(),
            Value::String(text) => text.parse().ok(),
            _ => None,
        };
        let remedy = || format!("use a number from {} to {}", range.start(), range.end());
        let number = number.ok_or_else(|| FieldError::new("is not a number", remedy()))?;
        if range.contains(&number) { Ok(number) } else { Err(FieldError::new("is out of range", remedy())) }
    }
}

/// Permission bits in octal.
pub(super) fn mode(value: &Value) -> Result<u32, FieldError> {
    let example = "write it in octal and in quotes, such as \"0666\" or \"0660\"";
    let Value::String(text) = value else { return Err(FieldError::new("is not a file mode", example)) };
    let digits = text.strip_prefix("0o").unwrap_or(text);
    let fine = (3..=4).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_digit());
    let mode = u32::from_str_radix(digits, 8).ok().filter(|mode| fine && *mode <= 0o777);
    mode.ok_or_else(|| FieldError::new("is not a file mode", example))
}

/// An absolute path.
pub(super) fn absolute_path(value: &Value) -> Result<PathBuf, FieldError> {
    let path = PathBuf::from(text(value)?);
    if path.is_absolute() { Ok(path) } else { Err(FieldError::new("is not an absolute path", "begin it with /")) }
}

/// An absolute path at which a socket can be bound.
pub(super) fn socket_path(value: &Value) -> Result<PathBuf, FieldError> {
    let path = absolute_path(value)?;
    let text = path.as_os_str();
    if text.len() > MAX_SOCKET_PATH_BYTES {
        let what = format!("is {} bytes long, and the kernel's limit allows {MAX_SOCKET_PATH_BYTES}", text.len());
        return Err(FieldError::new(what, "choose a shorter path"));
    }
    if path.file_name().is_none() || text.as_encoded_bytes().ends_with(b"/") {
        return Err(FieldError::new("names no file", "add the socket's file name, such as sds.sock"));
    }
    Ok(path)
}

/// An IP address and a port.
pub(super) fn socket_address(value: &Value) -> Result<SocketAddr, FieldError> {
    let wrong = || FieldError::new("is not an IP address with a port", "write, for example, 127.0.0.1:15090 or \"[::1]:15090\"");
    value.as_str().and_then(|text| text.parse().ok()).ok_or_else(wrong)
}

/// The name of a namespace: a DNS label.
pub(super) fn namespace(value: &Value) -> Result<String, FieldError> {
    let name = text(value)?;
    if is_dns_label(name) { Ok(name.to_owned()) } else { Err(FieldError::new("is not the name of a namespace", DNS_LABEL_RULE)) }
}

/// The name of a container: a DNS label.
pub(super) fn container(value: &Value) -> Result<String, FieldError> {
    let name = text(value)?;
    if is_dns_label(name) { Ok(name.to_owned()) } else { Err(FieldError::new("is not the name of a container", DNS_LABEL_RULE)) }
}

/// The name of a Kubernetes object: a DNS subdomain.
pub(super) fn object_name(value: &Value) -> Result<String, FieldError> {
    let name = text(value)?;
    if is_dns_name(name) { Ok(name.to_owned()) } else { Err(FieldError::new("is not the name of a Kubernetes object", DNS_NAME_RULE)) }
}

/// A key of a ConfigMap.
pub(super) fn config_map_key(value: &Value) -> Result<String, FieldError> {
    let key = text(value)?;
    let fine = key.len() <= 253 && key.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'));
    let wrong = || FieldError::new("cannot be a key of a ConfigMap", "use letters, digits, '.', '-' and '_'");
    if fine { Ok(key.to_owned()) } else { Err(wrong()) }
}

/// The rule for a DNS label.
pub(super) const DNS_LABEL_RULE: &str = "use 1 to 63 lower-case letters, digits and '-', with a letter or digit at both ends";
/// The rule that [`is_dns_name`] checks.
pub(super) const DNS_NAME_RULE: &str = "use lower-case letters, digits, '-' and '.', with a letter or digit at both ends of each part";

/// A label of an object and its value, which may be empty.
pub(super) fn object_label(key: &str, value: &Value) -> Result<String, FieldError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let edges = |text: &str| {
        let (first, last) = (text.bytes().next(), text.bytes().last());
        [first, last].iter().all(|b| b.is_none_or(|b| b.is_ascii_alphanumeric()))
    };
    let fine = |text: &str| text.len() <= 63 && text.bytes().all(plain) && edges(text);
    let (prefix, name) = key.split_once('/').map_or((None, key), |(prefix, name)| (Some(prefix), name));
    if name.is_empty() || !fine(name) || !prefix.is_none_or(is_dns_name) {
        return Err(FieldError::new("is under an invalid label key", "write a key such as app or example.com/tier"));
    }
    match value {
        Value::String(text) if fine(text) => Ok(text.clone()),
        Value::String(_) => {
            let rule = "use at most 63 letters, digits, '-', '_' and '.', with a letter or digit at both ends; patterns are not supported";
            Err(FieldError::new("is not the value of a label", rule))
        }
        Value::Number(_) | Value::Bool(_) => Err(FieldError::new("is not text", "put it in quotes")),
        _ => Err(FieldError::new("is not text", "write one value")),
    }
}

pub(crate) fn is_dns_label(name: &str) -> bool {
    let edge = |b: Option<u8>| b.is_some_and(|b| b != b'-');
    name.len() <= 63
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && edge(name.bytes().next())
        && edge(name.bytes().last())
}

/// Whether `name` is a DNS name in lower case, without a final dot.
pub(crate) fn is_dns_name(name: &str) -> bool {
    name.len() <= 253 && name.split('.').all(is_dns_label)
}
