//! How far the runs are: bars on a terminal, lines elsewhere. Everything goes to standard error.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::Result;

/// At least so long lies between two lines of a run, where there is no terminal.
const PAUSE: Duration = Duration::from_secs(15);

/// The progress of several runs, one after another or taking turns.
pub struct Progress {
    multi: MultiProgress,
    steps: u64,
    lines: bool,
}

/// The progress of one run.
pub struct Run {
    name: String,
    bar: ProgressBar,
    steps: u64,
    lines: bool,
    step: u64,
    /// The clock of the time left, which a run that is resumed starts anew.
    pace: Pace,
    told: Option<Instant>,
    /// None before the first update, and so for a run that was done when it was resumed.
    loss: Option<f64>,
    heldout: Option<f64>,
    tokens_per_second: f64,
}

/// Steps and the time that they took; pauses, in which other runs had their turn, do not count.
struct Pace {
    steps: u64,
    time: Duration,
}

impl Progress {
    /// Runs of so many steps each.
    pub fn new(steps: u64) -> Progress {
        let lines = !io::stderr().is_terminal();
        let multi = MultiProgress::new();
        if lines {
            multi.set_draw_target(indicatif::ProgressDrawTarget::hidden());
        }
        Progress { multi, steps, lines }
    }

    /// Adds a run, which begins at `step`.
    pub fn add(&self, name: &str, width: usize, step: u64) -> Result<Run> {
        let bar = self.multi.add(ProgressBar::new(self.steps));
        bar.set_style(
            ProgressStyle::with_template("{prefix} {bar:24} {pos}/{len}  {msg}")?
                .progress_chars("━╸─"),
        );
        bar.set_prefix(format!("{name:width$}"));
        bar.set_position(step);
        Ok(Run {
            name: name.into(),
            bar,
            steps: self.steps,
            lines: self.lines,
            step,
            pace: Pace { steps: 0, time: Duration::ZERO },
            told: None,
            loss: None,
            heldout: None,
            tokens_per_second: f64::NAN,
        })
    }
}

impl Run {
    /// The run is at `step`, reached with this loss, and a held-out loss if it was measured there; `took` is the time
    /// since the last call, without what other runs took.
    pub fn update(
        &mut self,
        step: u64,
        loss: f64,
        heldout: Option<f64>,
        tokens_per_second: f64,
        took: Duration,
    ) {
        self.pace.steps += step.saturating_sub(self.step);
        self.pace.time += took;
        (self.step, self.loss, self.tokens_per_second) = (step, Some(loss), tokens_per_second);
        self.heldout = heldout.or(self.heldout);
        self.bar.set_position(step);
        if !self.lines {
            self.bar.set_message(self.message(None));
        } else if heldout.is_some() || self.told.is_none_or(|told| told.elapsed() >= PAUSE) {
            self.told = Some(Instant::now());
            self.tell(&self.message(None));
        }
    }

    /// The run is over: done, or stopped, or failed, as `words` say.
    pub fn finish(self, words: &str) {
        let message = self.message(Some(words));
        if self.lines {
            self.tell(&message);
        }
        self.bar.abandon_with_message(message);
    }

    fn tell(&self, message: &str) {
        // Nobody to read it is no reason to end.
        let _ = writeln!(io::stderr(), "{} {}/{}  {message}", self.name, self.step, self.steps);
    }

    fn message(&self, end: Option<&str>) -> String {
        let mut parts: Vec<_> =
            self.loss.map(|loss| format!("loss {loss:.4}")).into_iter().collect();
        parts.extend(self.heldout.map(|loss| format!("held-out {loss:.4}")));
        if self.tokens_per_second.is_finite() {
            parts.push(format!("{} tok/s", crate::report::short(self.tokens_per_second)));
        }
        let left = self.steps.saturating_sub(self.step);
        if left > 0 && self.pace.steps > 0 {
            let seconds = self.pace.time.as_secs_f64() / self.pace.steps as f64 * left as f64;
            parts.push(format!("{} left", duration(seconds)));
        }
        parts.extend(end.map(String::from));
        parts.join("  ")
    }
}

/// `2 h 5 min`, `3 min 20 s`, `12 s`.
pub fn duration(seconds: f64) -> String {
    match seconds.round().clamp(0.0, 1e12) as u64 {
        s if s >= 86400 => format!("{} d {} h", s / 86400, s / 3600 % 24),
        s if s >= 3600 => format!("{} h {} min", s / 3600, s / 60 % 60),
        s if s >= 60 => format!("{} min {} s", s / 60, s % 60),
        s => format!("{s} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        assert_eq!(duration(12.4), "12 s");
        assert_eq!(duration(200.0), "3 min 20 s");
        assert_eq!(duration(7500.0), "2 h 5 min");
        assert_eq!(duration(90000.0), "1 d 1 h");
        assert_eq!(duration(f64::NAN), "0 s");
    }

    #[test]
    fn a_run_that_was_done_has_no_loss() {
        let run = Progress::new(1000).add("mxfp4", 8, 1000).unwrap();
        assert_eq!(run.message(Some("done")), "done");
    }

    #[test]
    fn the_time_left_is_that_of_the_steps_of_this_start() {
        let mut run = Progress::new(1000).add("mxfp4", 8, 500).unwrap();
        run.update(505, 2.75, Some(2.25), 1234.0, Duration::from_secs(10));
        run.update(510, 2.5, None, 1234.0, Duration::from_secs(10));
        assert_eq!(
            run.message(None),
            "loss 2.5000  held-out 2.2500  1.23k tok/s  16 min 20 s left"
        );
    }
}
