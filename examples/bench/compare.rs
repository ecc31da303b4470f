//! Results side by side, as Markdown.

use std::path::Path;

use serde_json::Value;

use crate::measure::operations;
use crate::{Result, gigabytes, seconds};

/// A file that `--json` wrote.
pub fn read(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    let value: Value = serde_json::from_str(&text)
        .map_err(|error| format!("{}: {error}: no result of this program", path.display()))?;
    if value["kind"] != "bench" || value["cases"].as_array().is_none() {
        return Err(format!("{}: not a result of bench --json", path.display()).into());
    }
    Ok(value)
}

/// The cases of a result.
pub fn cases(result: &Value) -> &[Value] {
    result["cases"].as_array().map_or(&[], Vec::as_slice)
}

pub fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or("?")
}

pub fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or(f64::NAN)
}

/// Operations a second.
pub fn rate(case: &Value) -> f64 {
    number(case, "flops") / number(case, "seconds")
}

/// The device's name, short enough for a column, with a number where two files have the same.
pub fn names(results: &[Value]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for result in results {
        let name = text(result, "device").split(" (").next().unwrap_or("?").to_string();
        let same =
            names.iter().filter(|n| **n == name || n.starts_with(&format!("{name} #"))).count();
        names.push(if same == 0 { name } else { format!("{name} #{}", same + 1) });
    }
    names
}

/// What stands before a case's numbers: its shape, tier and operands.
fn label(case: &Value) -> String {
    let experts = match case["experts"].as_u64() {
        Some(experts) => format!("{experts} experts, "),
        None => String::new(),
    };
    let size = |key| case[key].as_u64().unwrap_or(0);
    format!(
        "{experts}{} × {} × {} | {} | {} × {}",
        size("m"),
        size("n"),
        size("k"),
        text(case, "tier"),
        text(case, "a"),
        text(case, "b")
    )
}

pub fn tables(results: &[Value]) -> String {
    let names = names(results);
    let columns: String = names.iter().map(|name| format!(" {name} |")).collect();
    let right = "--:|".repeat(results.len());
    let mut out = String::new();
    for (result, name) in results.iter().zip(&names) {
        out += &format!(
            "- {name}: {}, {}; the {}'s clock; version {}\n",
            text(result, "backend"),
            text(result, "driver"),
            text(result, "clock"),
            text(result, "version")
        );
    }
    out += &format!("\n| measured peak |{columns}\n|---|{right}\n");
    for peak in ["copy", "f32 fma", "packed dot", "cooperative matrix"] {
        out += &format!("| {peak} |");
        for result in results {
            let peak = &result["peaks"][peak];
            let cell =
                match (peak["bytes_per_second"].as_f64(), peak["operations_per_second"].as_f64()) {
                    (Some(bytes), _) => gigabytes(bytes),
                    (_, Some(rate)) => operations(rate),
                    _ => "lacking".into(),
                };
            out += &format!(" {cell} |");
        }
        out.push('\n');
    }
    out += &format!("\n| m × n × k | tier | a × b |{columns}\n|---|---|---|{right}\n");
    let mut labels: Vec<String> = Vec::new();
    for case in results.iter().flat_map(cases) {
        let label = label(case);
        if !labels.contains(&label) {
            labels.push(label);
        }
    }
    for wanted in labels {
        out += &format!("| {wanted} |");
        for result in results {
            let found = cases(result).iter().find(|case| label(case) == wanted);
            let cell = found.map_or("–".into(), |case| {
                let share = case["share"].as_f64();
                let share = share.map_or(String::new(), |share| format!(", {:.0}%", 100.0 * share));
                format!("{}, {}{share}", seconds(number(case, "seconds")), operations(rate(case)))
            });
            out += &format!(" {cell} |");
        }
        out.push('\n');
    }
    out += "\nA cell is the median time, the rate, and its share of the measured peak of the tier's unit: packed dot for the \
            exact tier, cooperative matrix for tensor (of bytes where it computes in those), f32 fma for alu.\n";
    out
}
