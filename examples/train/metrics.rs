//! What was measured on the way, in a file of one JSON object a line (`metrics.jsonl`).
//!
//! Lines are written whole and at once. One that a kill cut short is the last, and is ignored by the reader. When runs go
//! on from checkpoints, the lines of later steps are dropped first, so that no step is there twice.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::Result;
use crate::output::OutputFile;

/// One line: what is known of a run at a step. What was not measured is `None`; a number that is not finite is `null` in
/// the file, and NaN when read again.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Record {
    /// The arm.
    pub arm: String,
    /// The seed of the run.
    pub seed: u64,
    /// Steps done.
    pub step: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// The mean loss of the step's batch, in nats a token.
    pub loss: Option<f64>,
    /// The mean loss on held-out text.
    pub heldout: Option<f64>,
    /// The learning rate.
    pub lr: Option<f64>,
    /// The norm of all gradients, before clipping.
    pub grad_norm: Option<f64>,
    /// Tokens trained on in a second.
    pub tokens_per_second: Option<f64>,
    /// The most memory in use so far, in bytes.
    pub peak_memory: Option<f64>,
    /// Further numbers by name, such as the share of clipped elements; each becomes a chart.
    pub counters: BTreeMap<String, f64>,
    /// Text that the model wrote.
    pub text: Option<String>,
}

const NUMBERS: [&str; 6] =
    ["loss", "heldout", "lr", "grad_norm", "tokens_per_second", "peak_memory"];

impl Record {
    /// In the order of [`NUMBERS`].
    fn numbers(&mut self) -> [&mut Option<f64>; 6] {
        [
            &mut self.loss,
            &mut self.heldout,
            &mut self.lr,
            &mut self.grad_norm,
            &mut self.tokens_per_second,
            &mut self.peak_memory,
        ]
    }

    fn to_line(&self) -> String {
        let mut object = Map::new();
        object.insert("arm".into(), self.arm.clone().into());
        for (key, value) in [("seed", self.seed), ("step", self.step), ("tokens", self.tokens)] {
            object.insert(key.into(), value.into());
        }
        // NaN and infinity become null.
        for (key, number) in NUMBERS.iter().zip(self.clone().numbers()) {
            if let Some(number) = *number {
                object.insert((*key).into(), number.into());
            }
        }
        if !self.counters.is_empty() {
            let counters = self.counters.iter().map(|(key, n)| (key.clone(), (*n).into()));
            object.insert("counters".into(), Value::Object(counters.collect()));
        }
        if let Some(text) = &self.text {
            object.insert("text".into(), text.clone().into());
        }
        Value::Object(object).to_string() + "\n"
    }

    fn from_line(line: &str) -> Result<Record> {
        let object: Value = serde_json::from_str(line)?;
        let whole = |key: &str| object[key].as_u64().ok_or_else(|| format!("no whole {key:?}"));
        let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
        let mut record = Record {
            arm: object["arm"].as_str().ok_or("no \"arm\"")?.into(),
            seed: whole("seed")?,
            step: whole("step")?,
            tokens: whole("tokens")?,
            text: object["text"].as_str().map(Into::into),
            ..Default::default()
        };
        for (key, slot) in NUMBERS.iter().zip(record.numbers()) {
            *slot = object.get(*key).map(number);
        }
        if let Some(counters) = object["counters"].as_object() {
            record.counters = counters.iter().map(|(key, n)| (key.clone(), number(n))).collect();
        }
        Ok(record)
    }
}

/// The file while it grows.
pub struct Metrics {
    path: PathBuf,
    file: File,
    records: Vec<Record>,
}

impl Metrics {
    /// Begins a file, or goes on with one: of each arm and seed the lines up to the step that `last` gives are kept, and
    /// none where it gives `None`.
    pub fn open(path: &Path, last: impl Fn(&str, u64) -> Option<u64>) -> Result<Metrics> {
        let mut records = match path.exists() {
            true => read(path)?,
            false => Vec::new(),
        };
        records.retain(|r| last(&r.arm, r.seed).is_some_and(|step| r.step <= step));
        let mut output = OutputFile::create(path, "train")?;
        output.write(|out| {
            records.iter().try_for_each(|record| out.write_all(record.to_line().as_bytes()))
        })?;
        output.finish()?;
        let file = OpenOptions::new().append(true).open(path).map_err(fail(path))?;
        Ok(Metrics { path: path.into(), file, records })
    }

    /// Adds a line.
    pub fn write(&mut self, record: Record) -> Result<()> {
        self.file.write_all(record.to_line().as_bytes()).map_err(fail(&self.path))?;
        self.records.push(record);
        Ok(())
    }

    /// All lines so far.
    pub fn records(&self) -> &[Record] {
        &self.records
    }
}

/// The lines of a file; the last is left out if it was not finished.
pub fn read(path: &Path) -> Result<Vec<Record>> {
    // A cut may fall within a character.
    let bytes = fs::read(path).map_err(fail(path))?;
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    let mut records = Vec::new();
    for (i, line) in String::from_utf8_lossy(&bytes[..whole]).lines().enumerate() {
        let record = Record::from_line(line)
            .map_err(|error| format!("{} line {}: {error}", path.display(), i + 1))?;
        records.push(record);
    }
    Ok(records)
}

fn fail(path: &Path) -> impl Fn(io::Error) -> String {
    move |error| format!("{}: {error}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(arm: &str, seed: u64, step: u64) -> Record {
        Record {
            arm: arm.into(),
            seed,
            step,
            tokens: step * 100,
            loss: Some(1.0 / (step as f64 + 3.0)),
            lr: Some(1e-4),
            counters: [("clipped".to_string(), 0.125)].into(),
            text: (step == 2).then(|| "fn main() { \"ä\\\"\n\u{0}".into()),
            ..Default::default()
        }
    }

    #[test]
    fn lines_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut metrics = Metrics::open(&path, |_, _| None).unwrap();
        for step in 1..5 {
            metrics.write(record("bf16", 0, step)).unwrap();
        }
        assert_eq!(read(&path).unwrap(), metrics.records());
        let infinite = Record { loss: Some(f64::INFINITY), ..record("bf16", 0, 5) };
        metrics.write(infinite).unwrap();
        assert!(read(&path).unwrap()[4].loss.unwrap().is_nan());
        assert!(fs::read_to_string(&path).unwrap().lines().count() == 5);
    }

    #[test]
    fn a_cut_line_is_ignored_and_later_steps_are_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut metrics = Metrics::open(&path, |_, _| None).unwrap();
        for step in 1..4 {
            metrics.write(record("bf16", 0, step)).unwrap();
            metrics.write(record("mxfp4 ä", 1, step)).unwrap();
        }
        drop(metrics);
        let whole = fs::read(&path).unwrap();
        let last = whole[..whole.len() - 1].iter().rposition(|b| *b == b'\n').unwrap() + 1;
        for len in last..whole.len() {
            fs::write(&path, &whole[..len]).unwrap();
            assert_eq!(read(&path).unwrap().len(), 5, "{len}");
        }
        let last = |arm: &str, seed| (arm == "mxfp4 ä" && seed == 1).then_some(2);
        let mut metrics = Metrics::open(&path, last).unwrap();
        assert_eq!(metrics.records().len(), 2);
        metrics.write(record("mxfp4 ä", 1, 3)).unwrap();
        let steps: Vec<_> = read(&path).unwrap().iter().map(|r| r.step).collect();
        assert_eq!(steps, [1, 2, 3]);
        // Elsewhere than at the end nothing is forgiven.
        fs::write(&path, b"{\"arm\": \"x\"\n").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("line 1"));
    }
}
