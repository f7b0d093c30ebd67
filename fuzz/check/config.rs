//! Properties of any configuration file. An input is its text.

use sds_agent::config::Config;

/// Longest line of an error: a field, an excerpt of its value, the fault and the remedy.
const MAX_CHARS: usize = 4000;

/// Panics if an accepted file has another meaning when it is read again, or if an error is not one line of limited length.
pub fn check(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let env = |name: &str| (name == "NODE_NAME" || name == "POD_NAMESPACE" || name == "POD_NAME").then(|| "a".to_owned());
    let read = || Config::parse(text, &env);
    match (read(), read()) {
        (Ok(first), Ok(second)) => {
            assert_eq!(format!("{:?}", first.config), format!("{:?}", second.config));
            assert_eq!(first.warnings, second.warnings);
            for warning in first.warnings {
                line(&warning.to_string());
            }
        }
        (Err(first), Err(second)) => {
            assert_eq!(first, second);
            assert!(!first.0.is_empty(), "an error without a problem");
            for problem in first.0 {
                assert!(!problem.path.is_empty() && !problem.what.is_empty() && !problem.remedy.is_empty(), "{problem:?}");
                line(&problem.to_string());
            }
        }
        (first, second) => panic!("{first:?} and {second:?}"),
    }
}

fn line(text: &str) {
    assert!(text.chars().count() < MAX_CHARS && !text.chars().any(char::is_control), "{text:?}");
}
