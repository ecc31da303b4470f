//! The pictures: SVG, written by hand.

use serde_json::Value;

use crate::compare::{cases, names, number, rate, text};

const WIDTH: f64 = 960.0;
const LEFT: f64 = 78.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 46.0;
const PLOT: f64 = 520.0;
/// One for each machine.
const HUES: [&str; 6] = ["#1b62b5", "#c4500b", "#21803a", "#8c3aa5", "#a3152f", "#5f5f00"];
const INK: &str = "#222";
const PALE: &str = "#e4e4e4";

/// Both axes are logarithmic.
struct Plot {
    body: String,
    x: (f64, f64),
    y: (f64, f64),
    /// What labels must not cover: left, top, right, bottom.
    taken: Vec<[f64; 4]>,
    /// What they had better not cover.
    lines: Vec<[f64; 4]>,
    legend: Vec<String>,
}

/// How the axes are marked.
struct Ticks<'a> {
    /// Decades where empty.
    x: &'a [f64],
    /// Of y.
    unit: &'a str,
    /// How far x goes on beyond the last value, as a factor.
    room: f64,
}

impl Plot {
    /// The ranges hold all of `x` and `y`, with some room.
    fn new(
        title: &str,
        x: &[f64],
        y: &[f64],
        [x_name, y_name]: [&str; 2],
        ticks: Ticks<'_>,
    ) -> Plot {
        let range = |values: &[f64], room: f64| {
            let finite = || values.iter().copied().filter(|v| v.is_finite() && *v > 0.0);
            let (min, max) = (finite().fold(f64::MAX, f64::min), finite().fold(0.0, f64::max));
            if max == 0.0 { (0.1, 10.0) } else { (min / 1.6, max * room) }
        };
        let mut plot = Plot {
            body: String::new(),
            x: range(x, ticks.room),
            y: range(y, 2.0),
            taken: Vec::new(),
            lines: Vec::new(),
            legend: Vec::new(),
        };
        let (right, bottom) = (WIDTH - RIGHT, TOP + PLOT);
        for tick in if ticks.x.is_empty() { decades(plot.x) } else { ticks.x.to_vec() } {
            let at = plot.px(tick);
            plot.line([at, TOP, at, bottom], PALE, 1.0, "");
            let words = if ticks.x.is_empty() { prefixed(tick) } else { format!("{tick}") };
            plot.words(at, bottom + 18.0, "middle", INK, &words);
        }
        for tick in decades(plot.y) {
            let at = plot.py(tick);
            plot.line([LEFT, at, right, at], PALE, 1.0, "");
            plot.words(LEFT - 8.0, at + 4.0, "end", INK, &(prefixed(tick) + ticks.unit));
        }
        plot.line([LEFT, TOP, LEFT, bottom], INK, 1.0, "");
        plot.line([LEFT, bottom, right, bottom], INK, 1.0, "");
        plot.words((LEFT + right) / 2.0, bottom + 40.0, "middle", INK, x_name);
        plot.body += &format!(
            "<text x=\"0\" y=\"0\" text-anchor=\"middle\" fill=\"{INK}\" transform=\"translate(20 {:.1}) rotate(-90)\">{}</text>\n",
            TOP + PLOT / 2.0,
            escaped(y_name)
        );
        plot.body += &format!(
            "<text x=\"{LEFT}\" y=\"24\" font-size=\"16\" font-weight=\"bold\" fill=\"{INK}\">{}</text>\n",
            escaped(title)
        );
        plot
    }

    fn px(&self, x: f64) -> f64 {
        LEFT + (x / self.x.0).ln() / (self.x.1 / self.x.0).ln() * (WIDTH - RIGHT - LEFT)
    }

    fn py(&self, y: f64) -> f64 {
        TOP + PLOT - (y / self.y.0).ln() / (self.y.1 / self.y.0).ln() * PLOT
    }

    fn line(&mut self, [x0, y0, x1, y1]: [f64; 4], stroke: &str, width: f64, dash: &str) {
        self.body += &format!(
            "<line x1=\"{x0:.1}\" y1=\"{y0:.1}\" x2=\"{x1:.1}\" y2=\"{y1:.1}\" stroke=\"{stroke}\" stroke-width=\"{width}\" \
             stroke-dasharray=\"{dash}\"/>\n"
        );
    }

    /// A line that labels keep off.
    fn course(&mut self, ends: [f64; 4], stroke: &str, width: f64, dash: &str) {
        self.line(ends, stroke, width, dash);
        let [x0, y0, x1, y1] = ends;
        let pieces = ((x1 - x0).hypot(y1 - y0) / 4.0).ceil().max(1.0);
        for i in 0..=pieces as usize {
            let part = i as f64 / pieces;
            let (x, y) = (x0 + part * (x1 - x0), y0 + part * (y1 - y0));
            self.lines.push([x - 2.0, y - 2.0, x + 2.0, y + 2.0]);
        }
    }

    fn words(&mut self, x: f64, y: f64, anchor: &str, fill: &str, text: &str) {
        self.body += &format!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"{fill}\">{}</text>\n",
            escaped(text)
        );
    }

    /// A point, and the room that it takes.
    fn point(&mut self, x: f64, y: f64, tier: &str, hue: &str, hollow: bool) {
        let (x, y) = (self.px(x), self.py(y));
        self.body += &marker(x, y, tier, hue, hollow);
        self.taken.push([x - 6.0, y - 6.0, x + 6.0, y + 6.0]);
    }

    /// Words at a point, where there is room around it; none where there is not.
    fn label(&mut self, x: f64, y: f64, hue: &str, text: &str) -> bool {
        let (x, y) = (self.px(x), self.py(y));
        let width = 6.6 * text.chars().count() as f64;
        let places = [
            (10.0, 4.0, "start"),
            (-10.0, 4.0, "end"),
            (0.0, -11.0, "middle"),
            (0.0, 20.0, "middle"),
            (9.0, -9.0, "start"),
            (9.0, 17.0, "start"),
            (-9.0, -9.0, "end"),
            (-9.0, 17.0, "end"),
            (0.0, -24.0, "middle"),
            (0.0, 33.0, "middle"),
        ];
        for strict in [true, false] {
            for (dx, dy, anchor) in places {
                let left = x + dx
                    - match anchor {
                        "start" => 0.0,
                        "end" => width,
                        _ => width / 2.0,
                    };
                let area = [left, y + dy - 11.0, left + width, y + dy + 3.0];
                let inside =
                    area[0] > LEFT && area[2] < WIDTH && area[1] > TOP && area[3] < TOP + PLOT;
                let own = [x - 6.0, y - 6.0, x + 6.0, y + 6.0];
                let clear = self.taken.iter().all(|t| *t == own || apart(&area, t))
                    && !(strict && self.lines.iter().any(|t| !apart(&area, t)));
                if inside && clear {
                    self.taken.push(area);
                    self.words(x + dx, y + dy, anchor, hue, text);
                    return true;
                }
            }
        }
        false
    }

    fn svg(self) -> String {
        let columns = 3;
        let rows = self.legend.len().div_ceil(columns);
        let top = TOP + PLOT + 66.0;
        let height = top + 22.0 * rows as f64 + 6.0;
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
             font-family=\"Helvetica, Arial, sans-serif\" font-size=\"12\">\n\
             <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#fff\"/>\n{}",
            self.body
        );
        for (i, entry) in self.legend.iter().enumerate() {
            let x = LEFT + (i / rows) as f64 * (WIDTH - LEFT) / columns as f64;
            let y = top + 22.0 * (i % rows) as f64;
            out += &format!("<g transform=\"translate({x:.1} {y:.1})\">{entry}</g>\n");
        }
        out + "</svg>\n"
    }
}

/// Whether two areas have nothing in common.
fn apart(a: &[f64; 4], b: &[f64; 4]) -> bool {
    a[2] < b[0] || b[2] < a[0] || a[3] < b[1] || b[3] < a[1]
}

fn marker(x: f64, y: f64, tier: &str, hue: &str, hollow: bool) -> String {
    let fill = if hollow { "#fff" } else { hue };
    let style = format!("fill=\"{fill}\" stroke=\"{hue}\" stroke-width=\"1.4\"");
    match tier {
        "tensor" => format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.2\" {style}/>\n"),
        "exact" => format!(
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"7.6\" height=\"7.6\" {style}/>\n",
            x - 3.8,
            y - 3.8
        ),
        _ => format!("<path d=\"M{x:.1} {:.1} l4.8 8.4 h-9.6 z\" {style}/>\n", y - 5.0),
    }
}

fn entry(sign: &str, text: &str, fill: &str) -> String {
    format!("{sign}<text x=\"34\" y=\"4\" fill=\"{fill}\">{}</text>", escaped(text))
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn decades((min, max): (f64, f64)) -> Vec<f64> {
    (min.log10().ceil() as i32..=max.log10().floor() as i32).map(|e| 10f64.powi(e)).collect()
}

/// `100 G`.
fn prefixed(value: f64) -> String {
    let prefixes = [
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
        (1.0, ""),
        (1e-3, "m"),
        (1e-6, "µ"),
    ];
    let (unit, prefix) =
        prefixes.into_iter().find(|(unit, _)| value >= 0.999 * unit).unwrap_or((1e-9, "n"));
    format!("{} {prefix}", (value / unit * 10.0).round() / 10.0)
}

const UNITS: [(&str, &str, &str); 3] = [
    ("cooperative matrix", "tensor", ""),
    ("packed dot", "exact", "7 4"),
    ("f32 fma", "alu", "2 3"),
];

fn machines(plot: &mut Plot, results: &[Value]) {
    for (i, name) in names(results).iter().enumerate() {
        let hue = HUES[i % HUES.len()];
        let sign = format!("<rect x=\"4\" y=\"-6\" width=\"20\" height=\"12\" fill=\"{hue}\"/>");
        plot.legend.push(entry(&sign, name, hue));
    }
}

fn dense(case: &Value) -> bool {
    ["a", "b"].iter().all(|key| matches!(text(case, key), "f32" | "f16" | "bf16"))
}

/// The rate of every product over its operations per byte, under each machine's roofs.
pub fn roofline(results: &[Value]) -> String {
    let (mut xs, mut ys) = (Vec::new(), Vec::new());
    for result in results {
        for case in cases(result) {
            xs.push(number(case, "flops") / number(case, "bytes"));
            ys.push(rate(case));
        }
        for (unit, ..) in UNITS {
            let peak = number(&result["peaks"][unit], "operations_per_second");
            ys.push(peak);
            xs.push(peak / number(&result["peaks"]["copy"], "bytes_per_second"));
        }
    }
    let mut plot = Plot::new(
        "Matrix products under the measured roofs",
        &xs,
        &ys,
        ["operations per byte of operands and output", "operations per second"],
        Ticks { x: &[], unit: "", room: 9.0 },
    );
    let mut roofs = Vec::new();
    for (i, result) in results.iter().enumerate() {
        let hue = HUES[i % HUES.len()];
        let copy = number(&result["peaks"]["copy"], "bytes_per_second");
        let peaks = UNITS.map(|(unit, _, dash)| {
            (unit, number(&result["peaks"][unit], "operations_per_second"), dash)
        });
        let highest = peaks.iter().map(|p| p.1).filter(|p| p.is_finite()).fold(0.0, f64::max);
        if !(copy > 0.0 && highest > 0.0) {
            continue;
        }
        // The slope ends at the highest roof, and begins where the picture does.
        let start = (plot.y.0 / copy).max(plot.x.0);
        let end = highest / copy;
        let slope = [plot.px(start), plot.py(start * copy), plot.px(end), plot.py(highest)];
        plot.course(slope, hue, 1.6, "");
        for (unit, peak, dash) in peaks {
            if peak.is_finite() {
                let (y, right) = (plot.py(peak), WIDTH - RIGHT);
                let roof = [plot.px(peak / copy), y, right, y];
                plot.course(roof, hue, 1.6, dash);
                roofs.push((y, unit, hue));
            }
        }
    }
    // Two roofs may lie close to each other.
    for (y, unit, hue) in roofs {
        let right = WIDTH - RIGHT;
        let width = 6.6 * unit.chars().count() as f64;
        let above = [right - width, y - 16.0, right, y - 3.0];
        let below = [above[0], y + 3.0, right, y + 16.0];
        let free = plot.taken.iter().chain(&plot.lines).all(|t| apart(&above, t));
        let area = if free { above } else { below };
        plot.taken.push(area);
        plot.words(right, area[3] - 3.0, "end", hue, unit);
    }
    // All points before the first label, which keeps off them.
    for (i, result) in results.iter().enumerate() {
        for case in cases(result) {
            let x = number(case, "flops") / number(case, "bytes");
            plot.point(x, rate(case), text(case, "tier"), HUES[i % HUES.len()], dense(case));
        }
    }
    // Of MXFP4 the fastest of each shape that is worth a name: few tokens, and the largest.
    for (i, result) in results.iter().enumerate() {
        let fours =
            || cases(result).iter().filter(|c| text(c, "a") == "mxfp4" && text(c, "b") == "mxfp4");
        let mut shapes: Vec<(String, f64)> = Vec::new();
        for case in fours() {
            let size = |key| case[key].as_u64().unwrap_or(0);
            let (m, n, k) = (size("m"), size("n"), size("k"));
            let words = match case["experts"].as_u64() {
                Some(experts) => format!("{experts} experts"),
                None if m == n && n == k => format!("{m}³"),
                None => format!("{m}×{n}×{k}"),
            };
            if !shapes.iter().any(|(w, _)| *w == words) {
                shapes.push((words, number(case, "flops")));
            }
        }
        // The largest first: they come to lie under the roofs, where points are few.
        shapes.sort_by(|a, b| b.1.total_cmp(&a.1));
        let few = 8;
        let step = shapes.len().div_ceil(few).max(1);
        for (words, flops) in shapes.iter().step_by(step) {
            let of_shape = fours().filter(|c| number(c, "flops") == *flops);
            if let Some(best) = of_shape.max_by(|a, b| rate(a).total_cmp(&rate(b))) {
                let x = number(best, "flops") / number(best, "bytes");
                plot.label(x, rate(best), HUES[i % HUES.len()], words);
            }
        }
    }
    machines(&mut plot, results);
    for (unit, tier, dash) in UNITS {
        let sign = format!(
            "<line x1=\"0\" y1=\"0\" x2=\"28\" y2=\"0\" stroke=\"#555\" stroke-width=\"1.6\" stroke-dasharray=\"{dash}\"/>{}",
            marker(14.0, 0.0, tier, "#555", false)
        );
        plot.legend.push(entry(&sign, &format!("{tier} tier, and the roof of {unit}"), INK));
    }
    let sign = marker(14.0, 0.0, "tensor", "#555", true);
    plot.legend.push(entry(&sign, "hollow: dense operands on both sides", INK));
    plot.svg()
}

/// One curve.
struct Series {
    machine: usize,
    tier: String,
    operands: String,
    hollow: bool,
    points: Vec<(f64, f64)>,
}

/// Time over size, for cubes of MXFP4 and of the dense baselines.
pub fn cubes(results: &[Value]) -> String {
    let mut series: Vec<Series> = Vec::new();
    for (i, result) in results.iter().enumerate() {
        for case in cases(result) {
            let size = |key| case[key].as_u64().unwrap_or(0);
            if size("m") != size("n") || size("n") != size("k") {
                continue;
            }
            let operands = format!("{} × {}", text(case, "a"), text(case, "b"));
            if operands != "mxfp4 × mxfp4" && !dense(case) {
                continue;
            }
            let point = (size("m") as f64, number(case, "seconds"));
            let tier = text(case, "tier").to_string();
            let same = |s: &&mut Series| (s.machine, &s.tier, &s.operands) == (i, &tier, &operands);
            match series.iter_mut().find(same) {
                Some(found) => found.points.push(point),
                None => series.push(Series {
                    machine: i,
                    tier,
                    operands,
                    hollow: dense(case),
                    points: vec![point],
                }),
            }
        }
    }
    let all = || series.iter().flat_map(|s| &s.points);
    let xs: Vec<f64> = all().map(|p| p.0).collect();
    let ys: Vec<f64> = all().map(|p| p.1).collect();
    let mut sides = xs.clone();
    sides.sort_by(f64::total_cmp);
    sides.dedup();
    let mut plot = Plot::new(
        "Time of y = A · Bᵀ, m = n = k",
        &xs,
        &ys,
        ["m = n = k", "time"],
        Ticks { x: &sides, unit: "s", room: 3.0 },
    );
    let mut names_of = Vec::new();
    for Series { machine, tier, operands, hollow, points } in &mut series {
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let hue = HUES[*machine % HUES.len()];
        for two in points.windows(2) {
            let ends = [plot.px(two[0].0), plot.py(two[0].1), plot.px(two[1].0), plot.py(two[1].1)];
            let dash = UNITS.iter().find(|u| u.1 == tier.as_str()).map_or("", |u| u.2);
            plot.course(ends, hue, if *hollow { 0.8 } else { 1.4 }, dash);
        }
        for (x, y) in points.iter() {
            plot.point(*x, *y, tier, hue, *hollow);
        }
        if let Some(last) = points.last() {
            names_of.push((*last, hue, format!("{tier}, {operands}")));
        }
    }
    for ((x, y), hue, words) in names_of {
        plot.label(x, y, hue, &words);
    }
    machines(&mut plot, results);
    for (_, tier, dash) in UNITS {
        let sign = format!(
            "<line x1=\"0\" y1=\"0\" x2=\"28\" y2=\"0\" stroke=\"#555\" stroke-width=\"1.4\" stroke-dasharray=\"{dash}\"/>{}",
            marker(14.0, 0.0, tier, "#555", false)
        );
        plot.legend.push(entry(&sign, &format!("{tier} tier"), INK));
    }
    let sign = marker(14.0, 0.0, "tensor", "#555", true);
    plot.legend.push(entry(&sign, "hollow: dense operands on both sides", INK));
    plot.svg()
}
