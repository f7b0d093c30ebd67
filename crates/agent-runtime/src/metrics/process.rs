//! The standard `process_*` metrics, read from `/proc/self` at each scrape, under the names that Prometheus client libraries use.
//!
//! A process that is not dumpable may still read these files. A metric that cannot be read is left out of the page.

use std::fs;

use nix::sys::resource::{Resource, getrlimit};
use procfs::{
    WithCurrentSystemInfo,
    process::{Process, Stat},
};
use prometheus_client::{
    collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
};

/// Reads `/proc` at each scrape.
#[derive(Debug)]
pub(super) struct Collector {
    ticks_per_second: f64,
    /// Boot time of the machine, in seconds since the epoch.
    booted: Option<u64>,
}

impl Collector {
    pub(super) fn new() -> Self {
        Self { ticks_per_second: procfs::ticks_per_second() as f64, booted: procfs::boot_time_secs().ok() }
    }

    /// User and system CPU time.
    fn cpu_seconds(&self, stat: &Stat) -> f64 {
        (stat.utime + stat.stime) as f64 / self.ticks_per_second
    }

    /// The start of the process, in seconds since the epoch.
    fn started_seconds(&self, stat: &Stat) -> Option<f64> {
        Some(self.booted? as f64 + stat.starttime as f64 / self.ticks_per_second)
    }
}

impl collector::Collector for Collector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut show = |name, help, metric: &dyn Shown| {
            let metric_encoder = encoder.encode_descriptor(name, help, None, metric.metric_type())?;
            metric.encode(metric_encoder)
        };
        if let Ok(stat) = stat() {
            show("process_cpu_seconds", "User and system CPU time spent.", &ConstCounter::new(self.cpu_seconds(&stat)))?;
            show("process_resident_memory_bytes", "Resident memory.", &ConstGauge::new(stat.rss_bytes().get()))?;
            show("process_virtual_memory_bytes", "Virtual memory.", &ConstGauge::new(stat.vsize))?;
            show("process_threads", "Threads of the operating system.", &ConstGauge::new(stat.num_threads))?;
            if let Some(started) = self.started_seconds(&stat) {
                let help = "Start of the process in seconds since the epoch.";
                show("process_start_time_seconds", help, &ConstGauge::new(started))?;
            }
        }
        if let Ok(entries) = fs::read_dir("/proc/self/fd") {
            // The directory that is being read is one of them.
            let open = entries.count().saturating_sub(1) as u64;
            show("process_open_fds", "Open file descriptors.", &ConstGauge::new(open))?;
        }
        if let Ok((limit, _)) = getrlimit(Resource::RLIMIT_NOFILE) {
            show("process_max_fds", "Maximum number of open file descriptors.", &ConstGauge::new(limit))?;
        }
        Ok(())
    }
}

/// [`EncodeMetric`] as an object.
trait Shown: EncodeMetric {}

impl<T: EncodeMetric> Shown for T {}

fn stat() -> procfs::ProcResult<Stat> {
    Process::myself()?.stat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_what_proc_says() {
        let (collector, stat) = (Collector::new(), stat().unwrap());
        let resident = stat.rss_bytes().get();
        assert!(stat.num_threads >= 1 && resident > 1 << 20 && stat.vsize >= resident, "{stat:?}");
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
        let started = collector.started_seconds(&stat).unwrap();
        assert!((now - started).abs() < 3600.0, "started {started}, now {now}");
    }
}
