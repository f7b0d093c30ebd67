//! The metrics page: this project's metrics under one prefix, and the standard metrics of the process.
//!
//! Owns the registry and its encoding ([`Format`]). Each module registers its metrics through [`Exposition::registry`], with names that
//! lack the prefix and, for counters, the suffix `_total`: the encoder adds both.

use std::fmt;

use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{family::Family, gauge::Gauge},
    registry::Registry,
};

mod format;
mod process;

/// Lists all variants of a label's type. A missing variant is a compile error.
#[macro_export]
macro_rules! every {
    ($label:ident: $($variant:ident),+ $(,)?) => {{
        #[allow(dead_code, reason = "the match has to be exhaustive")]
        fn is_complete(label: $label) {
            match label { $($label::$variant => {}),+ }
        }
        [$($label::$variant),+]
    }};
}
pub use crate::every;
pub use format::Format;

/// Label value that represents any value, in the reference.
#[cfg(any(test, feature = "testing"))]
pub const ANY: &str = "*";

/// Prefix of the names of this project's metrics.
pub const PREFIX: &str = "sds_agent";

/// All metrics of the process.
#[derive(Debug)]
pub struct Exposition {
    ours: Registry,
    standard: Registry,
}

impl Exposition {
    /// Creates a page with the metrics of the process, and `build_info` with this version and source revision. The modules add their own.
    pub fn new(version: &'static str, revision: &'static str) -> Self {
        let mut ours = Registry::with_prefix(PREFIX);
        let build = Family::<Build, Gauge>::default();
        build.get_or_create(&Build { version, revision }).set(1);
        ours.register("build_info", "1, labelled with the version and the source revision", build);

        let mut standard = Registry::default();
        standard.register_collector(Box::new(process::Collector::new()));
        Self { ours, standard }
    }

    /// Registry in which a module registers its metrics.
    pub fn registry(&mut self) -> &mut Registry {
        &mut self.ours
    }

    /// Returns the page with the current values.
    ///
    /// # Errors
    ///
    /// An error of a metric's encoder. Writing the page itself does not fail.
    pub fn encode(&self, format: Format) -> Result<String, fmt::Error> {
        let mut page = String::with_capacity(16 << 10);
        text::encode_registry(&mut page, &self.ours)?;
        text::encode_registry(&mut page, &self.standard)?;
        text::encode_eof(&mut page)?;
        Ok(match format {
            Format::OpenMetrics => page,
            Format::Text => format::as_text(&page),
        })
    }
}

/// Labels of `build_info`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Build {
    version: &'static str,
    revision: &'static str,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_our_prefix_the_standard_names_and_an_end() {
        let mut exposition = Exposition::new("1.2.3", "abc");
        let calls = prometheus_client::metrics::counter::Counter::<u64>::default();
        exposition.registry().register("calls", "Calls", calls.clone());
        calls.inc();
        let page = exposition.encode(Format::OpenMetrics).unwrap();
        for expected in [
            "sds_agent_build_info{version=\"1.2.3\",revision=\"abc\"} 1\n",
            "sds_agent_calls_total 1\n",
            "# TYPE process_cpu_seconds counter\nprocess_cpu_seconds_total ",
            "# TYPE process_resident_memory_bytes gauge\nprocess_resident_memory_bytes ",
        ] {
            assert!(page.contains(expected), "{expected:?} is missing in\n{page}");
        }
        assert!(page.ends_with("# EOF\n"));
        assert_eq!(page.matches("# EOF").count(), 1);
    }
}
