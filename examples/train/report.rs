//! The report: one HTML file without scripts, fonts or images of its own or from elsewhere, made from the metrics alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;

use crate::Result;
use crate::metrics::Record;
use crate::output::OutputFile;

/// What the metrics do not say.
#[derive(Clone, Debug, Default)]
pub struct Header {
    /// The heading.
    pub title: String,
    /// Device, model, data, command and the like, in this order.
    pub facts: Vec<(String, String)>,
    /// The arm that the others are compared with.
    pub baseline: String,
}

/// Writes the report, in one step as seen from outside.
pub fn write(path: &Path, header: &Header, records: &[Record]) -> Result<()> {
    let mut output = OutputFile::create(path, "train")?;
    output.write(|out| out.write_all(render(header, records).as_bytes()))?;
    output.finish()?;
    Ok(())
}

// ---- The numbers ----------------------------------------------------------------------------------------------------

/// A mean, and the sample standard deviation where there are several values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    pub mean: f64,
    pub deviation: Option<f64>,
}

impl Spread {
    fn of(values: &[f64]) -> Option<Spread> {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
        let deviation = (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt());
        (!values.is_empty()).then_some(Spread { mean, deviation })
    }

    fn show(&self, decimals: usize, sign: bool, unit: &str) -> String {
        if !self.mean.is_finite() {
            return "not finite".into();
        }
        let mean = match sign {
            true => format!("{:+.decimals$}", self.mean),
            false => format!("{:.decimals$}", self.mean),
        };
        let spread = self.deviation.map_or(String::new(), |d| format!(" ± {d:.decimals$}"));
        (mean + &spread + unit).replace('-', "−")
    }
}

/// The results of an arm.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    pub arm: String,
    pub seeds: usize,
    /// Of the run that has seen the fewest.
    pub tokens: u64,
    /// The last one of each seed, in nats a byte.
    pub heldout: Option<Spread>,
    /// In percent, at the latest step at which a seed of both was measured, over the seeds that were.
    pub gap: Option<Spread>,
    /// The median of all that was measured.
    pub tokens_per_second: Option<f64>,
    /// In bytes.
    pub peak_memory: Option<f64>,
    /// A loss was not finite.
    pub diverged: bool,
}

/// The held-out losses of an arm, by seed and step.
type HeldOut = BTreeMap<u64, BTreeMap<u64, f64>>;

/// The values of several seeds, by step.
type BySteps = BTreeMap<u64, Vec<f64>>;
/// The points of a line.
type Line = Vec<(f64, f64)>;

/// The records of an arm.
struct Arm<'a> {
    name: &'a str,
    /// By seed, in the order of steps.
    runs: BTreeMap<u64, Vec<&'a Record>>,
    heldout: HeldOut,
}

/// The arms, the baseline first and the others as they appear.
fn arms<'a>(records: &'a [Record], baseline: &str) -> Vec<Arm<'a>> {
    let mut arms: Vec<Arm<'a>> = Vec::new();
    for record in records {
        let at = arms.iter().position(|arm| arm.name == record.arm).unwrap_or_else(|| {
            let (runs, heldout) = Default::default();
            arms.push(Arm { name: &record.arm, runs, heldout });
            arms.len() - 1
        });
        arms[at].runs.entry(record.seed).or_default().push(record);
        if let Some(loss) = record.heldout {
            arms[at].heldout.entry(record.seed).or_default().insert(record.step, loss);
        }
    }
    arms.sort_by_key(|arm| arm.name != baseline);
    arms
}

/// Gaps in percent by step: one for each seed of which both are there.
fn gaps(arm: &HeldOut, baseline: &HeldOut) -> BySteps {
    let mut gaps: BySteps = BTreeMap::new();
    for (seed, losses) in arm {
        for (step, loss) in losses {
            if let Some(reference) = baseline.get(seed).and_then(|losses| losses.get(step)) {
                gaps.entry(*step).or_default().push(100.0 * (loss / reference - 1.0));
            }
        }
    }
    gaps
}

/// A line for each arm, the baseline first.
pub fn summarize(records: &[Record], baseline: &str) -> Vec<Summary> {
    let arms = arms(records, baseline);
    let reference = arms.first().filter(|arm| arm.name == baseline);
    let summary = |arm: &Arm<'_>| {
        let all = || arm.runs.values().flatten();
        let last: Vec<f64> =
            arm.heldout.values().filter_map(|losses| losses.values().last()).copied().collect();
        let gap = reference
            .filter(|reference| reference.name != arm.name)
            .and_then(|reference| gaps(&arm.heldout, &reference.heldout).into_values().next_back());
        let mut rates: Vec<f64> = all().filter_map(|r| r.tokens_per_second).collect();
        rates.retain(|rate| rate.is_finite());
        let tokens = arm.runs.values().filter_map(|run| run.last().map(|r| r.tokens)).min();
        Summary {
            arm: arm.name.into(),
            seeds: arm.runs.len(),
            tokens: tokens.unwrap_or(0),
            heldout: Spread::of(&last),
            gap: gap.and_then(|gap| Spread::of(&gap)),
            tokens_per_second: (!rates.is_empty()).then(|| microscaling::report::median(&rates)),
            peak_memory: all().filter_map(|r| r.peak_memory).reduce(f64::max),
            diverged: all().any(|r| [r.loss, r.heldout].iter().flatten().any(|l| !l.is_finite())),
        }
    };
    arms.iter().map(summary).collect()
}

const COLUMNS: [&str; 7] =
    ["arm", "held-out loss", "gap", "tokens/s", "peak memory", "tokens", "seeds"];

fn cells(summary: &Summary, baseline: &str) -> [String; 7] {
    let dash = || "–".to_string();
    let spread = |spread: &Option<Spread>, decimals, sign, unit: &str| {
        spread.as_ref().map_or_else(dash, |s| s.show(decimals, sign, unit))
    };
    [
        summary.arm.clone() + if summary.diverged { " (diverged)" } else { "" },
        spread(&summary.heldout, 4, false, ""),
        match summary.arm == baseline {
            true => "baseline".into(),
            false => spread(&summary.gap, 2, true, " %"),
        },
        summary.tokens_per_second.map_or_else(dash, short),
        summary.peak_memory.map_or_else(dash, memory),
        short(summary.tokens as f64),
        summary.seeds.to_string(),
    ]
}

/// The results as lines of text, for a terminal.
pub fn table(records: &[Record], baseline: &str) -> String {
    let mut rows = vec![COLUMNS.map(String::from)];
    rows.extend(summarize(records, baseline).iter().map(|summary| cells(summary, baseline)));
    let widths: [usize; 7] = std::array::from_fn(|column| {
        rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0)
    });
    let mut out = String::new();
    for row in rows {
        let cells = row.iter().zip(widths).enumerate().map(|(i, (cell, width))| match i {
            0 => format!("{cell:width$}"),
            _ => format!("{cell:>width$}"),
        });
        out += cells.collect::<Vec<_>>().join("  ").trim_end();
        out.push('\n');
    }
    out
}

/// `1.23M`: three digits and a prefix.
pub fn short(value: f64) -> String {
    let prefixes = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    let magnitude = value.abs();
    // What rounds to the next prefix has it.
    let (unit, prefix) =
        prefixes.into_iter().find(|(unit, _)| magnitude >= 0.9995 * unit).unwrap_or((1.0, ""));
    let scaled = value / unit;
    let decimals = match scaled.abs() {
        s if s >= 99.95 || unit == 1.0 && s.fract() == 0.0 => 0,
        s if s >= 9.995 => 1,
        _ => 2,
    };
    format!("{scaled:.decimals$}{prefix}")
}

fn memory(bytes: f64) -> String {
    match bytes {
        b if b >= 1e9 => format!("{:.2} GB", b / 1e9),
        b => format!("{:.1} MB", b / 1e6),
    }
}

// ---- The charts -----------------------------------------------------------------------------------------------------

const WIDTH: f64 = 440.0;
const HEIGHT: f64 = 272.0;
const LEFT: f64 = 48.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 38.0;
/// The arms' colours; the first is the ink of the text.
const HUES: usize = 8;
/// Steps up to this share of the run do not widen the axis of y: the first losses would flatten everything else.
const EARLY: f64 = 0.04;
/// The points of a line, and of one that is smoothed.
const POINTS: usize = 240;
const SMOOTHED: usize = 80;

/// What belongs to one arm in a chart.
struct Series {
    hue: usize,
    name: String,
    /// Lines without marks, drawn thin and pale.
    thin: Vec<Line>,
    /// A line with marks: x, and the mean, least and greatest y.
    marked: Vec<(f64, [f64; 3])>,
}

struct Chart<'a> {
    title: &'a str,
    note: &'a str,
    /// y begins, or ends, at zero.
    zero: bool,
    series: Vec<Series>,
}

impl Chart<'_> {
    /// Nothing where there is nothing to draw.
    fn html(&self) -> String {
        let points = || {
            self.series.iter().flat_map(|series| {
                let thin = series.thin.iter().flatten().copied();
                let marked =
                    series.marked.iter().flat_map(|(x, ys)| ys.iter().map(move |y| (*x, *y)));
                thin.chain(marked).filter(|(_, y)| y.is_finite())
            })
        };
        let x1 = points().map(|(x, _)| x).fold(0.0, f64::max);
        if x1 == 0.0 {
            return String::new();
        }
        // The early points count where there are no others.
        let counted = |from: f64| points().filter(move |(x, _)| *x >= from).map(|(_, y)| y);
        let from = if counted(EARLY * x1).next().is_some() { EARLY * x1 } else { 0.0 };
        let (mut y0, mut y1) =
            counted(from).fold((f64::MAX, f64::MIN), |(a, b), y| (a.min(y), b.max(y)));
        if self.zero {
            (y0, y1) = (y0.min(0.0), y1.max(0.0));
        }
        // Equal values get an axis too.
        let pad = if y1 > y0 { 0.05 * (y1 - y0) } else { y1.abs().max(1e-6) * 0.5 };
        let inner = |y: f64| if self.zero && y == 0.0 { 0.0 } else { pad };
        (y0, y1) = (y0 - inner(y0), y1 + inner(y1));
        let px = |x: f64| LEFT + x / x1 * (WIDTH - LEFT - RIGHT);
        let py = |y: f64| HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM);

        let mut svg = String::new();
        let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
        for (y, label) in ticks(y0, y1, 6) {
            let at = py(y);
            let class = if y == 0.0 { "axis" } else { "grid" };
            let _ = write!(
                svg,
                "<path class=\"{class}\" d=\"M{LEFT} {at:.1}H{right}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
                LEFT - 6.0,
                at + 4.0
            );
        }
        for (x, label) in ticks(0.0, x1, 5) {
            let at = px(x);
            // The last label stays within the picture.
            let anchor = if at > right - 12.0 { "end" } else { "middle" };
            let at_text = if anchor == "end" { right + 6.0 } else { at };
            let _ = write!(
                svg,
                "<path class=\"axis\" d=\"M{at:.1} {bottom}v4\"/>\
                 <text x=\"{at_text:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{label}</text>",
                bottom + 17.0
            );
        }
        let _ = write!(
            svg,
            "<path class=\"axis\" d=\"M{LEFT} {bottom}H{right}\"/>\
             <text x=\"{right}\" y=\"{:.1}\" text-anchor=\"end\" class=\"pale\">tokens</text>",
            HEIGHT - 4.0
        );
        // A nested picture clips what is outside of the axes, but not the last mark; an id would have to differ from chart to chart.
        let (w, h) = (right - LEFT + 4.0, bottom - TOP);
        let _ = write!(
            svg,
            "<svg x=\"{LEFT}\" y=\"{TOP}\" width=\"{w}\" height=\"{h}\" viewBox=\"{LEFT} {TOP} {w} {h}\">"
        );
        let path = |points: &mut dyn Iterator<Item = (f64, f64)>| {
            let mut d = String::new();
            let mut broken = true;
            for (x, y) in points {
                if !y.is_finite() {
                    broken = true;
                    continue;
                }
                // Far outside is outside.
                let y = py(y).clamp(-HEIGHT, 2.0 * HEIGHT);
                let _ = write!(d, "{}{:.1} {y:.1}", if broken { 'M' } else { 'L' }, px(x));
                broken = false;
            }
            d
        };
        for series in &self.series {
            for line in &series.thin {
                let d = path(&mut line.iter().copied());
                let _ = write!(svg, "<path class=\"thin h{}\" d=\"{d}\"/>", series.hue);
            }
        }
        for series in &self.series {
            let mut whiskers = String::new();
            let mut marks = String::new();
            for (x, [mean, least, greatest]) in &series.marked {
                if !mean.is_finite() {
                    continue;
                }
                let x_at = px(*x);
                if greatest > least {
                    let _ = write!(whiskers, "M{x_at:.1} {:.1}V{:.1}", py(*least), py(*greatest));
                }
                let _ = write!(
                    marks,
                    "<circle class=\"f{}\" cx=\"{x_at:.1}\" cy=\"{:.1}\" r=\"2.4\"><title>{}: {} at {} tokens</title></circle>",
                    series.hue,
                    py(*mean),
                    escaped(&series.name),
                    digits(*mean),
                    short(*x)
                );
            }
            let d = path(&mut series.marked.iter().map(|(x, ys)| (*x, ys[0])));
            let hue = series.hue;
            let _ = write!(
                svg,
                "<path class=\"whisker h{hue}\" d=\"{whiskers}\"/><path class=\"line h{hue}\" d=\"{d}\"/>"
            );
            // Where they would touch, the line alone says more.
            if series.marked.len() <= 40 {
                svg += &marks;
            }
        }
        svg += "</svg>";
        let mut legend = String::new();
        for series in &self.series {
            let _ = write!(
                legend,
                "<span><i class=\"b{}\"></i>{}</span>",
                series.hue,
                escaped(&series.name)
            );
        }
        let note = match self.note {
            "" => String::new(),
            note => format!("<p class=\"pale\">{}</p>", escaped(note)),
        };
        let title = escaped(self.title);
        format!(
            "<figure><figcaption><h3>{title}</h3><div class=\"legend\">{legend}</div></figcaption>\
             <svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{title}\">{svg}</svg>{note}</figure>\n"
        )
    }
}

/// Round numbers between two others, about `count` of them, with as many decimals as they need.
fn ticks(from: f64, to: f64, count: usize) -> Vec<(f64, String)> {
    let rough = (to - from) / count as f64;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0]
        .into_iter()
        .map(|digit| digit * power)
        .find(|step| *step >= rough * 0.999)
        .unwrap_or(10.0 * power);
    let (first, last) = ((from / step - 1e-9).ceil() as i64, (to / step + 1e-9).floor() as i64);
    let values: Vec<f64> = (first..=last).map(|i| i as f64 * step).collect();
    // One prefix for all of an axis.
    let greatest = values.iter().fold(0.0, |a: f64, b| a.max(b.abs()));
    let (unit, suffix) = match greatest.log10().floor() {
        power if power < -3.0 => (10f64.powf(power), format!("e{power}")),
        _ => [(1e9, "G"), (1e6, "M"), (1e3, "k")]
            .into_iter()
            .find(|(unit, _)| greatest >= *unit && step >= unit / 1000.0 * 0.999)
            .map_or((1.0, String::new()), |(unit, prefix)| (unit, prefix.into())),
    };
    let label = |value: f64| {
        if value == 0.0 {
            return "0".into();
        }
        if greatest < 1e-3 {
            return format!("{value:.1e}").replace(".0e", "e").replace('-', "−");
        }
        let scaled = step / unit;
        let decimals = (0..6)
            .find(|d| {
                let shifted = scaled * 10f64.powi(*d);
                (shifted - shifted.round()).abs() < 1e-6 * shifted
            })
            .unwrap_or(6);
        format!("{:.*}{suffix}", decimals as usize, value / unit).replace('-', "−")
    };
    values.into_iter().map(|value| (value, label(value))).collect()
}

/// Four digits that count.
fn digits(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        v if v < 1e-3 => format!("{value:.3e}"),
        v if v >= 1e4 => short(value),
        v => format!("{value:.*}", (3 - v.log10().floor() as i32).clamp(0, 6) as usize),
    }
    .replace('-', "−")
}

/// The means of about `count` pieces of a line. A piece with a value that is not finite is a gap.
fn thinned(points: &[(f64, f64)], count: usize) -> Line {
    let mean = |piece: &[(f64, f64)]| {
        let n = piece.len() as f64;
        piece.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0 / n, sum.1 + point.1 / n))
    };
    points.chunks(points.len().div_ceil(count).max(1)).map(mean).collect()
}

/// The mean, least and greatest of the finite values.
fn extent(values: &[f64]) -> [f64; 3] {
    let n = values.len() as f64;
    [
        values.iter().sum::<f64>() / n,
        values.iter().copied().fold(f64::INFINITY, f64::min),
        values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
    ]
}

/// The points of one number, run by run.
fn lines(arm: &Arm<'_>, number: impl Fn(&Record) -> Option<f64>) -> Vec<Line> {
    let line = |run: &Vec<&Record>| -> Line {
        run.iter().filter_map(|r| Some((r.tokens as f64, number(r)?))).collect()
    };
    arm.runs.values().map(line).filter(|line| !line.is_empty()).collect()
}

/// The charts of losses, gaps and counters, then those of less interest.
fn charts(records: &[Record], baseline: &str) -> [String; 3] {
    let arms = arms(records, baseline);
    let has_baseline = arms.first().is_some_and(|arm| arm.name == baseline);
    // The baseline has the first hue, whether it is there or not.
    let hue = |i: usize| (if has_baseline { i } else { i + 1 }) % HUES;
    // Steps are those of all arms, tokens those of the axis.
    let tokens = |arm: &Arm<'_>, step: u64| {
        let mut all = arm.runs.values().flatten();
        all.find(|r| r.step == step).map_or(f64::NAN, |r| r.tokens as f64)
    };
    let each = |make: &dyn Fn(&Arm<'_>) -> (Vec<Line>, BySteps)| {
        let series = arms.iter().enumerate().map(|(i, arm)| {
            let (thin, by_step) = make(arm);
            let marked =
                by_step.iter().map(|(step, ys)| (tokens(arm, *step), extent(ys))).collect();
            Series { hue: hue(i), name: arm.name.into(), thin, marked }
        });
        // The legend names what is drawn.
        series.filter(|s| !s.thin.is_empty() || !s.marked.is_empty()).collect::<Vec<_>>()
    };
    let by_step = |losses: &HeldOut| {
        let mut steps: BySteps = BTreeMap::new();
        for (step, loss) in losses.values().flatten() {
            steps.entry(*step).or_default().push(*loss);
        }
        steps
    };
    let seeds = arms.iter().any(|arm| arm.runs.len() > 1);
    let loss_note = match seeds {
        true => "Marks: held-out, mean of the seeds, with their range. Pale: training, smoothed.",
        false => "Marks: held-out. Pale: training, smoothed.",
    };
    let mut main = Chart {
        title: "Loss, nats per byte",
        note: loss_note,
        zero: false,
        series: each(&|arm| {
            let thin = lines(arm, |r| r.loss).iter().map(|line| thinned(line, SMOOTHED)).collect();
            (thin, by_step(&arm.heldout))
        }),
    }
    .html();
    if let (true, Some(reference)) = (has_baseline && arms.len() > 1, arms.first()) {
        let series = each(&|arm| match arm.name == baseline {
            true => Default::default(),
            false => (Vec::new(), gaps(&arm.heldout, &reference.heldout)),
        });
        main += &Chart {
            title: &format!("Gap of the held-out loss to {baseline}, %"),
            note: "Above 0 the arm is worse. Paired by seed.",
            zero: true,
            series,
        }
        .html();
    }
    let thin = |number: &dyn Fn(&Record) -> Option<f64>| {
        let smoothed = |arm: &Arm<'_>| {
            let lines = lines(arm, number);
            (lines.iter().map(|line| thinned(line, POINTS)).collect(), BTreeMap::new())
        };
        let mut series = each(&smoothed);
        for series in &mut series {
            // Several seeds are pale; one is the thing itself.
            if let [line] = &series.thin[..] {
                series.marked = line.iter().map(|(x, y)| (*x, [*y; 3])).collect();
                series.thin.clear();
            }
        }
        series
    };
    let names: BTreeSet<&str> =
        records.iter().flat_map(|r| r.counters.keys().map(String::as_str)).collect();
    let mut counters = String::new();
    let mut zeros = Vec::new();
    for name in names {
        if records.iter().all(|r| r.counters.get(name).is_none_or(|n| *n == 0.0)) {
            zeros.push(escaped(name));
            continue;
        }
        let series = thin(&|r| r.counters.get(name).copied());
        counters += &Chart { title: name, note: "", zero: true, series }.html();
    }
    if !zeros.is_empty() {
        let _ = writeln!(counters, "<p class=\"wide\">Zero throughout: {}.</p>", zeros.join(", "));
    }
    let mut rest = String::new();
    for (title, number) in [
        ("Norm of the gradients", (|r: &Record| r.grad_norm) as fn(&Record) -> Option<f64>),
        ("Learning rate", |r| r.lr),
        ("Tokens per second", |r| r.tokens_per_second),
    ] {
        rest += &Chart { title, note: "", zero: true, series: thin(&number) }.html();
    }
    [main, counters, rest]
}

// ---- The page -------------------------------------------------------------------------------------------------------

const STYLE: &str = include_str!("report.css");

/// The report as HTML.
pub fn render(header: &Header, records: &[Record]) -> String {
    let baseline = &header.baseline;
    let title = escaped(&header.title);
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{title}</title>\n<style>\n{STYLE}</style>\n\
         </head>\n<body>\n<main>\n<h1>{title}</h1>\n<dl>\n"
    );
    for (name, value) in &header.facts {
        let _ = writeln!(page, "<dt>{}</dt><dd>{}</dd>", escaped(name), escaped(value));
    }
    page += "</dl>\n<h2>Results</h2>\n<div class=\"scroll\"><table>\n<thead><tr>";
    for (i, column) in COLUMNS.iter().enumerate() {
        let column = match i {
            2 => format!("gap to {}", escaped(baseline)),
            _ => (*column).into(),
        };
        let _ = write!(page, "<th>{column}</th>");
    }
    page += "</tr></thead>\n<tbody>\n";
    let summaries = summarize(records, baseline);
    for summary in &summaries {
        page += "<tr>";
        for cell in cells(summary, baseline) {
            let _ = write!(page, "<td>{}</td>", escaped(&cell));
        }
        page += "</tr>\n";
    }
    page += "</tbody>\n</table></div>\n<p class=\"pale\">Held-out loss in nats per byte, at the last measurement of each \
             seed.";
    if summaries.iter().any(|summary| summary.seeds > 1) {
        page += " Mean ± standard deviation over the seeds; gaps are paired by seed.";
    }
    page += " Tokens/s is the median.</p>\n";
    let [main, counters, rest] = charts(records, baseline);
    if !main.is_empty() {
        let _ = writeln!(page, "<h2>Curves</h2>\n<div class=\"charts\">\n{main}</div>");
    }
    if !counters.is_empty() {
        let _ = writeln!(page, "<h2>Counters</h2>\n<div class=\"charts\">\n{counters}</div>");
    }
    if !rest.is_empty() {
        let _ = writeln!(page, "<h2>Training</h2>\n<div class=\"charts\">\n{rest}</div>");
    }
    // The last text of each arm, of its first seed that has one.
    let mut samples = String::new();
    for arm in arms(records, baseline) {
        let mut runs = arm.runs.values();
        let last = |run: &Vec<&'_ Record>| {
            run.iter().rev().find_map(|r| Some((r.tokens, r.text.clone()?)))
        };
        if let Some((tokens, text)) = runs.find_map(last) {
            let _ = writeln!(
                samples,
                "<h3>{} <span class=\"pale\">after {} tokens</span></h3>\n<pre>{}</pre>",
                escaped(arm.name),
                short(tokens as f64),
                escaped(&text)
            );
        }
    }
    if !samples.is_empty() {
        let _ = writeln!(page, "<h2>Generated text</h2>\n{samples}");
    }
    page + "</main>\n</body>\n</html>\n"
}

/// Text as HTML shows it; control characters, which it may not hold, become their pictures.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\n' | '\t' => out.push(c),
            '\0'..='\x1f' => out.extend(char::from_u32(0x2400 + c as u32)),
            '\x7f'..='\u{9f}' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(arm: &str, seed: u64, step: u64, heldout: f64) -> Record {
        Record {
            arm: arm.into(),
            seed,
            step,
            tokens: step * 100,
            loss: Some(heldout),
            heldout: Some(heldout),
            ..Default::default()
        }
    }

    #[test]
    fn gaps_are_paired_by_seed_and_step() {
        let records = [
            record("mx", 0, 10, 2.2),
            record("mx", 1, 10, 2.4),
            record("bf16", 0, 10, 2.0),
            record("bf16", 1, 10, 2.0),
            record("bf16", 1, 20, 1.0),
            record("<none>", 7, 10, f64::NAN),
        ];
        let summaries = summarize(&records, "bf16");
        assert_eq!(
            summaries.iter().map(|s| s.arm.as_str()).collect::<Vec<_>>(),
            ["bf16", "mx", "<none>"]
        );
        let gap = summaries[1].gap.unwrap();
        assert!((gap.mean - 15.0).abs() < 1e-9);
        assert!((gap.deviation.unwrap() - 50f64.sqrt()).abs() < 1e-9);
        assert_eq!(summaries[0].heldout.unwrap().mean, 1.5);
        assert_eq!((summaries[0].tokens, summaries[2].diverged), (1000, true));
        assert_eq!(summaries[2].gap, None);
        let table = table(&records, "bf16");
        assert!(
            table.contains("+15.00 ± 7.07 %") && table.contains("<none> (diverged)"),
            "{table}"
        );
        let header = Header { baseline: "bf16".into(), ..Default::default() };
        let page = render(&header, &records);
        assert!(
            page.contains("&lt;none&gt;") && !page.contains("<none>") && !page.contains("NaN,")
        );
        // Nothing at all is a page as well.
        assert!(render(&header, &[]).contains("</html>"));
    }

    #[test]
    fn ticks_are_round_and_their_labels_differ() {
        for (from, to) in [
            (0.0, 1.0),
            (1.23, 1.29),
            (0.0, 5e7),
            (-0.7, 2.9),
            (0.0, 3e-4),
            (1e4, 1.1e4),
            (0.0, 65536.0),
        ] {
            let ticks = ticks(from, to, 6);
            let labels: BTreeSet<&String> = ticks.iter().map(|(_, label)| label).collect();
            assert!((3..9).contains(&ticks.len()) && labels.len() == ticks.len(), "{ticks:?}");
            assert!(labels.iter().all(|label| label.chars().count() <= 7), "{ticks:?}");
        }
        let labels: Vec<String> = ticks(0.0, 5e7, 5).into_iter().map(|(_, label)| label).collect();
        assert_eq!(labels, ["0", "10M", "20M", "30M", "40M", "50M"]);
        assert_eq!(short(1234567.0), "1.23M");
        assert_eq!(short(999.96e3), "1.00M");
        assert_eq!(digits(-0.012345), "−0.01235");
    }

    #[test]
    fn thinned_lines_break_at_what_is_not_finite() {
        let line: Vec<(f64, f64)> =
            (0..1000).map(|i| (f64::from(i), if i == 500 { f64::NAN } else { 2.0 })).collect();
        let thin = thinned(&line, POINTS);
        assert!(thin.len() <= POINTS && thin[0].0 == 2.0);
        assert_eq!(thin.iter().filter(|(_, y)| y.is_nan()).count(), 1);
        assert!(thin.iter().all(|(_, y)| y.is_nan() || (y - 2.0).abs() < 1e-12));
        assert_eq!(thinned(&line[..3], POINTS), line[..3]);
        assert!(thinned(&[], POINTS).is_empty());
    }

    #[test]
    fn control_characters_are_shown() {
        assert_eq!(escaped("a<\0\r\n\u{85}\u{1b}"), "a&lt;␀␍\n\u{fffd}␛");
    }
}
