//! Compares the interfaces that other programs use with `tests/interfaces.txt`: metrics, JSON, reasons, log fields, exit codes, services,
//! configuration, command line.
//!
//! Some of these words come from names in the code, such as the variants of a label's type. A rename that changes one of them fails here.
//! To accept an intended change, run `UPDATE_INTERFACES=1 cargo test --lib interfaces`, and describe the change in CHANGELOG.md.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use cert_manager::denied;
use clap::CommandFactory;
use proc_macro2::{Delimiter, TokenStream, TokenTree};
use quote::ToTokens;
use sds_server::sds;
use syn::{Attribute, Expr, Fields, Item, Lit, Meta};

use crate::{
    cli::{Cli, Exit},
    config::reference::GROUPS,
    metrics_reference,
};

/// The macros for log lines and for spans, whose fields a log line carries.
const LOG_MACROS: [&str; 10] =
    ["error", "warn", "info", "debug", "trace", "error_span", "warn_span", "info_span", "debug_span", "trace_span"];

#[test]
fn interfaces_stay_as_they_are() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interfaces.txt");
    let now = snapshot();
    if std::env::var_os("UPDATE_INTERFACES").is_some() {
        fs::write(&path, now.iter().map(|line| format!("{line}\n")).collect::<String>()).unwrap();
        return;
    }
    let written = fs::read_to_string(&path).unwrap();
    let written: BTreeSet<_> = written.lines().map(str::to_owned).collect();
    let gone: Vec<_> = written.difference(&now).map(|line| format!("- {line}")).collect();
    let new: Vec<_> = now.difference(&written).map(|line| format!("+ {line}")).collect();
    assert!(
        gone.is_empty() && new.is_empty(),
        "interfaces have changed; if that is meant, run UPDATE_INTERFACES=1 cargo test --lib interfaces\n{}",
        [gone, new].concat().join("\n")
    );
}

/// The other tests would pass with an empty snapshot.
#[test]
fn the_snapshot_has_every_kind_of_interface() {
    let lines = snapshot();
    for expected in [
        "metric sds_agent_issuances_total counter issuer=* result=",
        "config certificate.renewAt ",
        "cli sds-agent fetch --write-key <FILE>",
        "exit 64 Usage",
        "health envoy.service.secret.v3.SecretDiscoveryService",
        "denial ProfileMismatch",
        "event CertificateDenied",
        "json keys healthy steps",
        "json value held_by_client",
        "json value failed",
        "doctor step pod",
        "log warn sds_agent::sds::service::drive ",
    ] {
        assert!(lines.iter().any(|line| line.starts_with(expected)), "nothing begins with {expected:?}");
    }
}

/// Operators alert on the text of these lines.
#[test]
fn the_documentation_tells_of_lines_that_there_are() {
    let source: String = sources(Path::new(env!("CARGO_MANIFEST_DIR"))).into_iter().map(|path| fs::read_to_string(path).unwrap()).collect();
    let rows = include_str!("../docs/logs.md").lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
    let messages: Vec<&str> = rows.map(|(message, _)| message).collect();
    assert!(messages.len() > 15);
    let unknown: Vec<_> = messages.into_iter().filter(|message| !source.contains(&format!("\"{message}"))).collect();
    assert!(unknown.is_empty(), "docs/logs.md lists messages that the source does not have: {unknown:?}");
}

fn snapshot() -> BTreeSet<String> {
    let mut lines: BTreeSet<String> = metrics_reference::series().into_iter().map(|series| format!("metric {series}")).collect();
    for field in GROUPS.iter().flat_map(|group| group.fields) {
        lines.insert(format!("config {} {:?}, {:?}", field.path, field.kind, field.default));
    }
    let mut cli = Cli::command();
    cli.build();
    command(&cli, "", &mut lines);
    for exit in [Exit::Ok, Exit::Failed, Exit::Usage, Exit::Unavailable, Exit::NotPermitted] {
        lines.insert(format!("exit {} {exit:?}", exit.code()));
    }
    lines.insert(format!("health {}", sds::service::SERVICE));
    lines.extend(denied::ALL.iter().map(|reason| format!("denial {reason}")));
    for path in sources(Path::new(env!("CARGO_MANIFEST_DIR"))) {
        let file = syn::parse_file(&fs::read_to_string(&path).unwrap()).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let source = Source { log_target: log_target(&file.items), path: path.display().to_string() };
        items(file.items, &source, &mut lines);
    }
    lines
}

fn command(command: &clap::Command, parent: &str, lines: &mut BTreeSet<String>) {
    let name = format!("{parent}{}", command.get_name());
    lines.insert(format!("cli {name}"));
    for argument in command.get_arguments() {
        let flag = argument.get_long().map_or_else(|| format!("[{}]", argument.get_id()), |long| format!("--{long}"));
        let short = argument.get_short().map(|short| format!(" -{short}")).unwrap_or_default();
        let values: Vec<_> = argument.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect();
        let value = match (argument.get_action().takes_values(), argument.get_value_names()) {
            (true, Some(names)) if values.is_empty() => format!(" <{}>", names.join(" ")),
            (true, _) => format!(" {}", values.join("|")),
            (false, _) => String::new(),
        };
        let default: Vec<_> = argument.get_default_values().iter().map(|value| value.to_string_lossy().into_owned()).collect();
        let default = if default.is_empty() { String::new() } else { format!(" = {}", default.join(" ")) };
        lines.insert(format!("cli {name} {flag}{short}{value}{default}"));
    }
    for subcommand in command.get_subcommands() {
        self::command(subcommand, &format!("{name} "), lines);
    }
}

/// A source file.
struct Source {
    path: String,
    /// The value of its constant `LOG_TARGET`. Each module that logs has one, so that log filters stay valid when the module moves.
    log_target: Option<String>,
}

/// Every source file of the workspace that is not test code.
pub(crate) fn sources(root: &Path) -> Vec<PathBuf> {
    let crates = fs::read_dir(root.join("crates")).unwrap().map(|entry| entry.unwrap().path());
    [root.to_owned()].into_iter().chain(crates).flat_map(|package| sources_in(&package.join("src"))).collect()
}

fn sources_in(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap();
        if matches!(
            stem,
            "tests" | "test_keys" | "foreign_text" | "fake" | "wire" | "captured" | "reference" | "metrics_reference" | "interfaces"
        ) {
            continue;
        }
        if path.is_dir() {
            found.extend(sources_in(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}

fn log_target(items: &[Item]) -> Option<String> {
    items.iter().find_map(|item| match item {
        Item::Const(constant) if constant.ident == "LOG_TARGET" => match &*constant.expr {
            Expr::Lit(literal) => match &literal.lit {
                Lit::Str(target) => Some(target.value()),
                _ => None,
            },
            _ => None,
        },
        _ => None,
    })
}

fn items(list: Vec<Item>, source: &Source, lines: &mut BTreeSet<String>) {
    for item in list {
        match item {
            Item::Mod(module) if is_test(&module.attrs) => {}
            Item::Mod(module) => {
                if let Some((_, inner)) = module.content {
                    items(inner, source, lines);
                }
            }
            Item::Fn(function) if is_test(&function.attrs) => {}
            Item::Impl(block) if is_test(&block.attrs) => {}
            other => {
                match &other {
                    Item::Struct(record) if derives(&record.attrs, "Serialize") => keys(&record.attrs, &record.fields, lines),
                    Item::Enum(choice) if derives(&choice.attrs, "Serialize") => {
                        for variant in &choice.variants {
                            lines
                                .insert(format!("json value {}", renamed(&choice.attrs, &variant.attrs, &variant.ident.to_string(), true)));
                        }
                    }
                    _ => {}
                }
                scan(other.to_token_stream(), source, lines);
            }
        }
    }
}

fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| attribute.to_token_stream().to_string().contains("test"))
}

fn derives(attributes: &[Attribute], name: &str) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("derive")
            && attribute.to_token_stream().to_string().split(|c: char| !c.is_alphanumeric()).any(|word| word == name)
    })
}

/// The keys of a record, as serde writes them.
fn keys(attributes: &[Attribute], fields: &Fields, lines: &mut BTreeSet<String>) {
    let Fields::Named(named) = fields else { return };
    let mut keys: Vec<_> = named
        .named
        .iter()
        .filter(|field| !serde(&field.attrs).iter().any(|(key, _)| key == "skip" || key == "flatten"))
        .map(|field| renamed(attributes, &field.attrs, &field.ident.as_ref().unwrap().to_string(), false))
        .collect();
    keys.sort_unstable();
    lines.insert(format!("json keys {}", keys.join(" ")));
}

/// The name that serde writes for a field or a variant.
fn renamed(container: &[Attribute], own: &[Attribute], name: &str, is_variant: bool) -> String {
    let value = |attributes: &[Attribute], key: &str| serde(attributes).into_iter().find(|(found, _)| found == key).map(|(_, value)| value);
    if let Some(name) = value(own, "rename") {
        return name;
    }
    let words: Vec<String> = if is_variant {
        let mut words: Vec<String> = Vec::new();
        for c in name.chars() {
            match words.last_mut() {
                Some(word) if !c.is_uppercase() => word.push(c),
                _ => words.push(c.to_lowercase().to_string()),
            }
        }
        words
    } else {
        name.split('_').map(str::to_owned).collect()
    };
    let capital = |word: &String| word[..1].to_uppercase() + &word[1..];
    match value(container, "rename_all").as_deref() {
        None => name.to_owned(),
        Some("lowercase") => words.concat(),
        Some("snake_case") => words.join("_"),
        Some("kebab-case") => words.join("-"),
        Some("camelCase") => words[..1].iter().cloned().chain(words[1..].iter().map(capital)).collect(),
        Some("PascalCase") => words.iter().map(capital).collect(),
        Some(other) => panic!("this test does not know rename_all = {other:?}"),
    }
}

/// The keys of serde's attributes, with their values if these are strings.
fn serde(attributes: &[Attribute]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for attribute in attributes.iter().filter(|attribute| attribute.path().is_ident("serde")) {
        let metas = attribute.parse_args_with(syn::punctuated::Punctuated::<Meta, syn::Token![,]>::parse_terminated).unwrap();
        for meta in metas {
            let key = meta.path().to_token_stream().to_string();
            let value = match &meta {
                Meta::NameValue(pair) => match &pair.value {
                    Expr::Lit(literal) => match &literal.lit {
                        Lit::Str(text) => text.value(),
                        _ => String::new(),
                    },
                    _ => String::new(),
                },
                _ => String::new(),
            };
            found.push((key, value));
        }
    }
    found
}

/// Collects log lines, JSON keys, and words in tables of names.
fn scan(tokens: TokenStream, source: &Source, lines: &mut BTreeSet<String>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    for (at, token) in tokens.iter().enumerate() {
        if let TokenTree::Group(group) = token {
            scan(group.stream(), source, lines);
            let before = |back: usize| at.checked_sub(back).map(|at| tokens[at].to_string()).unwrap_or_default();
            let (name, is_macro) = if before(1) == "!" { (before(2), true) } else { (before(1), false) };
            if is_macro && LOG_MACROS.contains(&name.as_str()) {
                lines.insert(logged(&name, source, group.stream()));
            } else if is_macro && name == "json" {
                let mut keys = BTreeSet::new();
                json_keys(group.stream(), &mut keys);
                if !keys.is_empty() {
                    lines.insert(format!("json keys {}", keys.into_iter().collect::<Vec<_>>().join(" ")));
                }
            } else if before(4) == "Step" && matches!(name.as_str(), "ok" | "warning" | "failed" | "unknown") {
                if let Some(step) = group.stream().into_iter().next().and_then(text) {
                    lines.insert(format!("doctor step {step}"));
                }
            } else if group.delimiter() == Delimiter::Parenthesis && before(1) != "!" {
                // `(State::Valid, "valid")` in a table of words.
                let inner: Vec<_> = group.stream().into_iter().collect();
                if inner.len() == 6
                    && inner[0].to_string() == "State"
                    && let Some(word) = text(inner[5].clone())
                {
                    lines.insert(format!("json value {word}"));
                }
            }
        }
        // `let name = "pod"` and `let (agent, ready) = ("agent", "readiness")` of the doctor.
        if token.to_string() == "=" && at >= 2 && tokens[at - 2].to_string() == "let" && source.path.contains("/cli/doctor") {
            let names = tokens[at - 1].to_string();
            let value = match tokens.get(at + 1) {
                Some(TokenTree::Group(group)) => group.stream().into_iter().filter_map(text).collect(),
                Some(other) => text(other.clone()).into_iter().collect::<Vec<_>>(),
                None => Vec::new(),
            };
            if names.split(|c: char| !c.is_alphanumeric()).any(|word| matches!(word, "name" | "agent" | "ready")) {
                lines.extend(value.into_iter().map(|step| format!("doctor step {step}")));
            }
        }
        // `Self::CertificateDenied => "CertificateDenied"`
        if let Some(word) = text(token.clone())
            && at >= 3
            && tokens[at - 1].to_string() == ">"
            && tokens[at - 3].to_string() == word
            && source.path.contains("/src/events")
        {
            lines.insert(format!("event {word}"));
        }
    }
}

fn text(token: TokenTree) -> Option<String> {
    match token {
        TokenTree::Literal(literal) => match Lit::new(literal) {
            Lit::Str(text) => Some(text.value()),
            _ => None,
        },
        _ => None,
    }
}

fn json_keys(tokens: TokenStream, keys: &mut BTreeSet<String>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    for (at, token) in tokens.iter().enumerate() {
        match token {
            TokenTree::Group(group) if group.delimiter() != Delimiter::Parenthesis => json_keys(group.stream(), keys),
            TokenTree::Punct(colon) if colon.as_char() == ':' && at > 0 => keys.extend(text(tokens[at - 1].clone())),
            _ => {}
        }
    }
}

/// A line of the log, without its message: the level, the target and the names of its fields.
fn logged(name: &str, source: &Source, arguments: TokenStream) -> String {
    let (mut fields, mut target, mut span) = (BTreeSet::new(), None, String::new());
    let tokens: Vec<TokenTree> = arguments.into_iter().collect();
    let is_comma = |token: &TokenTree| matches!(token, TokenTree::Punct(punct) if punct.as_char() == ',');
    for argument in tokens.split(is_comma) {
        let words: Vec<String> = argument.iter().map(ToString::to_string).collect();
        let end = words.iter().position(|word| word == "=" || word == ":").unwrap_or(words.len());
        let path: String = words[..end].iter().filter(|word| !matches!(word.as_str(), "%" | "?")).map(String::as_str).collect();
        match (path.as_str(), words.get(end).map(String::as_str)) {
            ("target", Some(":")) => {
                target = match words.last().map(String::as_str) {
                    Some("LOG_TARGET") => source.log_target.clone(),
                    _ => argument.last().cloned().and_then(text),
                };
            }
            ("parent" | "name", Some(":")) | ("", _) => {}
            (_, None) if argument.len() == 1 && text(argument[0].clone()).is_some() => {
                if name.ends_with("_span") && fields.is_empty() && span.is_empty() {
                    span = text(argument[0].clone()).unwrap_or_default() + " ";
                }
            }
            // An expression instead of a message.
            (path, None) if !path.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '.')) => {}
            (path, _) => drop(fields.insert(path.to_owned())),
        }
    }
    let fields: Vec<_> = fields.into_iter().collect();
    let target = target.unwrap_or_else(|| panic!("{}: a {name} without `target: LOG_TARGET` and that constant", source.path));
    format!("log {name} {target} {span}{}", fields.join(" "))
}
