//! Medians, percentiles, alternating rounds, and the table.

use std::{future::Future, time::Duration};

/// The smallest value that the share `share` of the values does not exceed.
pub fn percentile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let rank = (share * values.len() as f64).ceil() as usize;
    values[rank.clamp(1, values.len()) - 1]
}

/// The median.
pub fn median(values: &mut [f64]) -> f64 {
    percentile(values, 0.5)
}

/// Converts a duration to microseconds.
pub fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

/// The results of two implementations of the same work.
#[derive(Debug, Clone, Copy)]
pub struct Compared {
    /// The median of the rounds' ratios.
    pub ratio: f64,
    /// The first implementation's median over the rounds.
    pub ours: f64,
    /// The second implementation's median over the rounds.
    pub floor: f64,
}

/// Measures both in every round and alternates the order, so that other load affects both equally.
pub async fn alternate<A, B>(rounds: usize, mut ours: impl FnMut() -> A, mut floor: impl FnMut() -> B) -> Compared
where
    A: Future<Output = f64>,
    B: Future<Output = f64>,
{
    let (mut all_ours, mut all_floor, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    // The first round warms both up.
    for round in 0..=rounds {
        let (mine, theirs);
        if round % 2 == 0 {
            mine = ours().await;
            theirs = floor().await;
        } else {
            theirs = floor().await;
            mine = ours().await;
        }
        if round > 0 {
            all_ours.push(mine);
            all_floor.push(theirs);
            ratios.push(mine / theirs);
        }
    }
    Compared { ratio: median(&mut ratios), ours: median(&mut all_ours), floor: median(&mut all_floor) }
}

/// The target of a figure.
#[derive(Debug, Clone, Copy)]
pub enum Target {
    AtMost(f64),
    AtLeast(f64),
    /// The figure is printed beside a target and has none itself.
    None,
}

/// One line of the table.
#[derive(Debug)]
pub struct Row {
    pub figure: &'static str,
    pub value: f64,
    pub unit: &'static str,
    pub target: Target,
    /// The figures from which it was computed.
    pub of: String,
}

impl Row {
    fn is_met(&self) -> Option<bool> {
        match self.target {
            Target::AtMost(most) => Some(self.value <= most),
            Target::AtLeast(least) => Some(self.value >= least),
            Target::None => None,
        }
    }

    fn target(&self) -> String {
        match self.target {
            Target::AtMost(most) => format!("≤ {most}"),
            Target::AtLeast(least) => format!("≥ {least}"),
            Target::None => String::new(),
        }
    }

    fn json(&self) -> serde_json::Value {
        let (at_most, at_least) = match self.target {
            Target::AtMost(most) => (Some(most), None),
            Target::AtLeast(least) => (None, Some(least)),
            Target::None => (None, None),
        };
        serde_json::json!({
            "figure": self.figure, "value": self.value, "unit": self.unit,
            "at_most": at_most, "at_least": at_least, "met": self.is_met(), "of": self.of,
        })
    }
}

/// Prints the table, or one JSON array.
pub fn print(rows: &[Row], json: bool) {
    if json {
        println!("{:#}", serde_json::Value::from_iter(rows.iter().map(Row::json)));
        return;
    }
    println!("| figure | measured | target | met | of |\n|---|---|---|---|---|");
    for row in rows {
        let met = row.is_met().map_or("", |met| if met { "yes" } else { "no" });
        println!("| {} | {:.2} {} | {} | {met} | {} |", row.figure, row.value, row.unit, row.target(), row.of);
    }
}
