//! The standard `process_*` metrics, read from `/proc/self` at each scrape, under the names that every Prometheus user knows.
//!
//! A not dumpable process may still read these files. What cannot be read is left out of the page.

use std::fs;

use nix::{
    sys::resource::{Resource, getrlimit},
    unistd::{SysconfVar, sysconf},
};
use prometheus_client::{
    collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
};

/// Reads `/proc` when asked.
#[derive(Debug)]
pub(super) struct Collector {
    units: Units,
    /// When the machine was booted, in seconds since the epoch.
    booted: Option<f64>,
}

/// What the kernel counts in.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Units {
    ticks_per_second: f64,
    page_bytes: u64,
}

/// The fields of `/proc/self/stat` that are shown.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Stat {
    cpu_seconds: f64,
    threads: u64,
    /// Since boot.
    started_seconds: f64,
    virtual_bytes: u64,
    resident_bytes: u64,
}

impl Collector {
    pub(super) fn new() -> Self {
        let variable = |name| sysconf(name).ok().flatten().and_then(|value| u32::try_from(value).ok());
        let units = Units {
            ticks_per_second: variable(SysconfVar::CLK_TCK).unwrap_or(100).into(),
            page_bytes: variable(SysconfVar::PAGE_SIZE).unwrap_or(4096).into(),
        };
        let booted = fs::read_to_string("/proc/stat").ok().and_then(|stat| boot_time(&stat));
        Self { units, booted }
    }
}

impl collector::Collector for Collector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut show = |name, help, metric: &dyn Shown| {
            let metric_encoder = encoder.encode_descriptor(name, help, None, metric.metric_type())?;
            metric.encode(metric_encoder)
        };
        if let Some(stat) = fs::read_to_string("/proc/self/stat").ok().and_then(|line| Stat::parse(&line, self.units)) {
            show("process_cpu_seconds", "User and system CPU time spent.", &ConstCounter::new(stat.cpu_seconds))?;
            show("process_resident_memory_bytes", "Resident memory.", &ConstGauge::new(stat.resident_bytes))?;
            show("process_virtual_memory_bytes", "Virtual memory.", &ConstGauge::new(stat.virtual_bytes))?;
            show("process_threads", "Threads of the operating system.", &ConstGauge::new(stat.threads))?;
            if let Some(booted) = self.booted {
                let help = "Start of the process in seconds since the epoch.";
                show("process_start_time_seconds", help, &ConstGauge::new(booted + stat.started_seconds))?;
            }
        }
        if let Ok(entries) = fs::read_dir("/proc/self/fd") {
            // One of them is the directory itself, being read.
            let open = entries.count().saturating_sub(1) as u64;
            show("process_open_fds", "Open file descriptors.", &ConstGauge::new(open))?;
        }
        if let Ok((limit, _)) = getrlimit(Resource::RLIMIT_NOFILE) {
            show("process_max_fds", "Most file descriptors that may be open.", &ConstGauge::new(limit))?;
        }
        Ok(())
    }
}

/// [`EncodeMetric`] as an object.
trait Shown: EncodeMetric {}

impl<T: EncodeMetric> Shown for T {}

impl Stat {
    /// Reads one line of `/proc/<pid>/stat`. The second field is the program's name in parentheses and may hold anything.
    fn parse(line: &str, units: Units) -> Option<Self> {
        let (_, rest) = line.rsplit_once(')')?;
        // The third field of the manual page is the first here.
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        let seconds = |ticks: u64| ticks as f64 / units.ticks_per_second;
        Some(Self {
            cpu_seconds: seconds(field(14)? + field(15)?),
            threads: field(20)?,
            started_seconds: seconds(field(22)?),
            virtual_bytes: field(23)?,
            resident_bytes: field(24)? * units.page_bytes,
        })
    }
}

fn boot_time(stat: &str) -> Option<f64> {
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNITS: Units = Units { ticks_per_second: 100.0, page_bytes: 4096 };

    #[test]
    fn a_stat_line_is_read_whatever_the_program_is_called() {
        let numbers = "S 1 2 2 0 -1 4194304 500 0 0 0 250 50 0 0 20 0 7 0 12345 1073741824 3000 18446744073709551615 1 1 0";
        let expected = Stat { cpu_seconds: 3.0, threads: 7, started_seconds: 123.45, virtual_bytes: 1 << 30, resident_bytes: 3000 * 4096 };
        for name in ["sds-agent", "a b", "a) S 1 (b"] {
            assert_eq!(Stat::parse(&format!("42 ({name}) {numbers}"), UNITS), Some(expected), "{name}");
        }
        for broken in ["", "42 (a)", "42 (a) S 1 2", "42 (a) S x x x x x x x x x x x x x x x x x x x x x x"] {
            assert_eq!(Stat::parse(broken, UNITS), None, "{broken}");
        }
    }

    #[test]
    fn this_process_is_what_proc_says() {
        let collector = Collector::new();
        let stat = Stat::parse(&fs::read_to_string("/proc/self/stat").unwrap(), collector.units).unwrap();
        assert!(stat.threads >= 1 && stat.resident_bytes > 1 << 20 && stat.virtual_bytes >= stat.resident_bytes, "{stat:?}");
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
        let started = collector.booted.unwrap() + stat.started_seconds;
        assert!((now - started).abs() < 3600.0, "started {started}, now {now}");
    }
}
