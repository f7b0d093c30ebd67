//! Requests over time as an SVG, with one panel below the other for each scenario.

use std::{fmt::Write, time::Duration};

use crate::simulation::{Outcome, Scenario};

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 110.0;
const LEFT: f64 = 60.0;
const STEP: f64 = 165.0;

/// One scenario's requests per window.
pub struct Panel {
    title: String,
    counts: Vec<u32>,
    mean: f64,
    until: Duration,
}

impl Panel {
    /// The panel for `outcome`.
    pub fn new(title: &str, outcome: &Outcome, scenario: &Scenario, window: Duration) -> Self {
        let counts = outcome.windows(window, &(Duration::ZERO..scenario.until));
        Self { title: title.to_owned(), counts, mean: scenario.mean_rate() * window.as_secs_f64(), until: scenario.until }
    }
}

/// The whole drawing.
pub fn svg(panels: &[Panel]) -> String {
    let (width, height) = (LEFT + WIDTH + 20.0, STEP * panels.len() as f64 + 20.0);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    for (n, panel) in panels.iter().enumerate() {
        draw(&mut out, panel, STEP * n as f64 + 30.0);
    }
    out.push_str("</svg>\n");
    out
}

fn draw(out: &mut String, panel: &Panel, top: f64) {
    // Higher values are cut off: a cold start makes all requests at once, and would make all other values invisible.
    let ceiling = panel.mean * 4.0;
    let points = panel.counts.len().max(1);
    // Several windows share a pixel: the busiest one is drawn.
    let columns = points.min(WIDTH as usize);
    let y = |count: f64| top + HEIGHT - HEIGHT * (count / ceiling).min(1.0);
    let mut path = String::new();
    for column in 0..columns {
        let range = column * points / columns..((column + 1) * points / columns).max(column * points / columns + 1);
        let peak = panel.counts.get(range).and_then(|counts| counts.iter().max()).copied().unwrap_or(0);
        let x = LEFT + WIDTH * column as f64 / columns as f64;
        let _ = write!(path, "{}{x:.1} {:.1}", if column == 0 { "M" } else { " L" }, y(f64::from(peak)));
    }
    let (bottom, right, mean) = (top + HEIGHT, LEFT + WIDTH, y(panel.mean));
    let hours = panel.until.as_secs() / 3600;
    let _ = writeln!(
        out,
        "<text x=\"{LEFT}\" y=\"{:.1}\" font-weight=\"bold\">{}</text>\n\
         <path d=\"M{LEFT} {bottom:.1} H{right} M{LEFT} {top:.1} V{bottom:.1}\" stroke=\"#666\" fill=\"none\"/>\n\
         <path d=\"M{LEFT} {mean:.1} H{right}\" stroke=\"#c33\" stroke-dasharray=\"4 3\" fill=\"none\"/>\n\
         <path d=\"{path}\" stroke=\"#246\" stroke-width=\"0.8\" fill=\"none\"/>\n\
         <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{:.0}/min</text>\n\
         <text x=\"{right}\" y=\"{:.1}\" text-anchor=\"end\">{hours} h</text>",
        top - 8.0,
        panel.title,
        LEFT - 6.0,
        mean + 4.0,
        panel.mean,
        bottom + 14.0,
    );
}
