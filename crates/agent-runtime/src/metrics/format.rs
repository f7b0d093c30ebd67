//! The two formats of the metrics page, and their selection by a request's `Accept` header.
//!
//! OpenMetrics 1.0 is for scrapers that name it, as Prometheus does, and the older text format, version 0.0.4, for all others. The page is
//! encoded as OpenMetrics and converted to the older format if needed. The two differ in the names of counters in their descriptions, and
//! in comments.

use http::{HeaderMap, header};

/// A format of the page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// <https://prometheus.io/docs/specs/om/open_metrics_spec/>, version 1.0.0
    OpenMetrics,
    /// <https://prometheus.io/docs/instrumenting/exposition_formats/>, version 0.0.4
    Text,
}

const OPEN_METRICS: &str = "application/openmetrics-text";
const TEXT: &str = "text/plain";

impl Format {
    /// Selects the format by the request's `Accept` header. OpenMetrics must be named, with a weight at least as high as that of text.
    /// `*/*` selects text, because browsers and command-line clients send it.
    pub fn of(request: &HeaderMap) -> Self {
        let (mut open_metrics, mut text) = (0.0, 0.0);
        for value in request.get_all(header::ACCEPT) {
            for range in value.to_str().unwrap_or_default().split(',') {
                let mut parts = range.split(';').map(str::trim);
                let media = parts.next().unwrap_or_default();
                let (mut weight, mut has_version) = (1.0, true);
                for part in parts {
                    match part.split_once('=').map(|(name, value)| (name.trim(), value.trim())) {
                        Some((name, value)) if name.eq_ignore_ascii_case("q") => weight = value.parse().unwrap_or(0.0),
                        Some((name, value)) if name.eq_ignore_ascii_case("version") => has_version = matches!(value, "1.0.0" | "0.0.4"),
                        _ => {}
                    }
                }
                if media.eq_ignore_ascii_case(OPEN_METRICS) && has_version {
                    open_metrics = f64::max(open_metrics, weight);
                } else if media.eq_ignore_ascii_case(TEXT) && has_version {
                    text = f64::max(text, weight);
                }
            }
        }
        if open_metrics > 0.0 && open_metrics >= text { Self::OpenMetrics } else { Self::Text }
    }

    /// Returns the media type of the format.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// Converts an OpenMetrics page to the older text format.
pub(super) fn as_text(page: &str) -> String {
    let mut text = String::with_capacity(page.len());
    // In OpenMetrics `HELP` precedes `TYPE`, which decides the name in the description.
    let mut help = None;
    for line in page.split_inclusive('\n') {
        let words = line.trim_end().strip_prefix("# ").map(|rest| rest.splitn(3, ' '));
        let mut words = words.into_iter().flatten();
        match [words.next(), words.next(), words.next()] {
            [Some("HELP"), Some(_), Some(words)] => help = Some(words),
            [Some("TYPE"), Some(name), Some(kind)] => {
                let total = if kind == "counter" { "_total" } else { "" };
                if let Some(help) = help.take() {
                    text.extend(["# HELP ", name, total, " ", help, "\n"]);
                }
                text.extend(["# TYPE ", name, total, " ", kind, "\n"]);
            }
            [Some("UNIT" | "EOF"), ..] => {}
            _ => text.push_str(line),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn asked(values: &[&'static str]) -> Format {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(header::ACCEPT, HeaderValue::from_static(value));
        }
        Format::of(&headers)
    }

    #[test]
    fn open_metrics_is_for_those_that_name_it() {
        let prometheus = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
                          application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=0.0.4;q=0.4,*/*;q=0.2";
        assert_eq!(asked(&[prometheus]), Format::OpenMetrics);
        for open_metrics in [
            "application/openmetrics-text",
            "Application/OpenMetrics-Text; Version=1.0.0",
            "text/plain;q=0.5, application/openmetrics-text; q=0.5",
        ] {
            assert_eq!(asked(&[open_metrics]), Format::OpenMetrics, "{open_metrics}");
        }
        assert_eq!(asked(&["text/plain;q=0.1", "application/openmetrics-text;q=0.9"]), Format::OpenMetrics);
    }

    #[test]
    fn everybody_else_gets_text() {
        assert_eq!(asked(&[]), Format::Text);
        for text in [
            "*/*",
            "text/plain",
            "application/openmetrics-text;q=0",
            "application/openmetrics-text;q=much",
            "application/openmetrics-text;version=2.0.0",
            "text/plain, application/openmetrics-text;q=0.9",
            "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited,*/*;q=0.1",
            "",
            ",;=,q=1",
        ] {
            assert_eq!(asked(&[text]), Format::Text, "{text}");
        }
    }

    #[test]
    fn text_names_counters_as_their_samples_and_has_no_other_comments() {
        let page = "# HELP a_things Things, all of them.\n# TYPE a_things counter\na_things_total{x=\"# TYPE b\"} 1\n\
                    # HELP a_wait_seconds Time.\n# TYPE a_wait_seconds histogram\n# UNIT a_wait_seconds seconds\na_wait_seconds_sum 0.5\n\
                    # TYPE c gauge\nc 2\n# EOF\n";
        let text = "# HELP a_things_total Things, all of them.\n# TYPE a_things_total counter\na_things_total{x=\"# TYPE b\"} 1\n\
                    # HELP a_wait_seconds Time.\n# TYPE a_wait_seconds histogram\na_wait_seconds_sum 0.5\n\
                    # TYPE c gauge\nc 2\n";
        assert_eq!(as_text(page), text);
    }
}
