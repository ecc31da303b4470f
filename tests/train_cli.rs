//! The program `examples/train` as its users run it: arms side by side, files out, kills, Ctrl-C, and messages.
#![cfg(feature = "safetensors")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use common::cli::Dir;
use microscaling::train::checkpoint::{Checkpoint, LATEST};
use serde_json::Value;

const STEPS: u64 = 8;
/// Two arms of a small batch; checkpoints as often as there are numbers, which is every step.
const ARGS: [&str; 18] = [
    "--data",
    "text.txt",
    "--arms",
    "bf16,mxfp4",
    "--steps",
    "8",
    "--batch",
    "2",
    "--seq",
    "32",
    "--held-out",
    "1",
    "--save-every",
    "0",
    "--device",
    "cpu",
    "--out",
    "out",
];

impl Dir {
    /// With a text.
    fn with_text() -> Dir {
        let dir = Dir::new("train");
        let line = |i: u32| format!("{i}: the quick brown fox jumps over the lazy dog {}\n", i * i);
        dir.write("text.txt", (0..300).map(line).collect::<String>().as_bytes());
        dir
    }

    /// Runs with these arguments in place of, or beside, [`ARGS`].
    fn train(&self, args: &[&str]) -> Output {
        self.run(&with(args))
    }

    #[track_caller]
    fn ok(&self, args: &[&str]) -> String {
        let output = self.train(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Must fail with this code and a last line (of usage errors: a first one) that contains `says`.
    #[track_caller]
    fn fails(&self, code: i32, says: &[&str], args: &[&str]) {
        self.failed(self.train(args), code, says);
    }

    #[track_caller]
    fn failed(&self, output: Output, code: i32, says: &[&str]) {
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{stderr}");
        let at = stderr.find("error: ").unwrap_or_else(|| panic!("{stderr:?}"));
        for text in says {
            assert!(stderr[at..].contains(text), "{stderr:?} lacks {text:?}");
        }
    }

    fn spawn(&self, args: &[&str]) -> Child {
        let mut command = self.command(None, &with(args));
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// The lines of the metrics so far.
    fn metrics(&self) -> Vec<Value> {
        lines(&fs::read(self.path("out/metrics.jsonl")).unwrap_or_default())
    }

    /// Waits until there are so many lines, and a little longer.
    fn wait_for(&self, lines: usize, child: &mut Child, more: Duration) {
        let start = Instant::now();
        while self.metrics().len() < lines {
            assert!(start.elapsed() < Duration::from_secs(100), "no {lines} lines");
            assert!(child.try_wait().unwrap().is_none(), "it ended before {lines} lines");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(more);
    }

    /// Ends as the run that nothing happened to.
    #[track_caller]
    fn ends_like_the_whole_run(&self) {
        let results = |bytes: &[u8]| {
            let mut lines = lines(bytes);
            for line in &mut lines {
                // What depends on the clock and the machine.
                let object = line.as_object_mut().unwrap();
                object.remove("tokens_per_second");
                object.remove("peak_memory");
            }
            lines
        };
        for (name, want) in &whole().files {
            let got = self.read(name);
            match *name {
                METRICS => assert_eq!(results(&got), results(want)),
                REPORT => {}
                _ => assert!(got == *want, "{name} differs"),
            }
        }
    }
}

/// The lines of a file of metrics; one that is not finished is none.
fn lines(text: &[u8]) -> Vec<Value> {
    let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    let text = std::str::from_utf8(&text[..whole]).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// [`ARGS`] with others: an option that is there is replaced.
fn with<'a>(args: &[&'a str]) -> Vec<&'a str> {
    let mut all: Vec<&'a str> = Vec::new();
    for pair in ARGS.chunks(2).filter(|pair| !args.contains(&pair[0])) {
        all.extend(pair);
    }
    all.extend(args);
    all
}

/// A run that nothing happened to, which others are compared with.
struct Whole {
    stdout: String,
    files: BTreeMap<&'static str, Vec<u8>>,
}

const METRICS: &str = "out/metrics.jsonl";
const REPORT: &str = "out/report.html";
const CHECKPOINTS: [&str; 2] = ["out/bf16-0/latest.safetensors", "out/mxfp4-0/latest.safetensors"];

fn whole() -> &'static Whole {
    static WHOLE: OnceLock<Whole> = OnceLock::new();
    WHOLE.get_or_init(|| {
        let dir = Dir::with_text();
        let stdout = dir.ok(&[]);
        let names = [METRICS, REPORT, CHECKPOINTS[0], CHECKPOINTS[1]];
        Whole { stdout, files: names.map(|name| (name, dir.read(name))).into() }
    })
}

#[test]
fn two_arms_side_by_side() {
    let Whole { stdout, files } = whole();
    for text in
        ["device", "492160 parameters", "unigram entropy", "held-out loss", "baseline", " %"]
    {
        assert!(stdout.contains(text), "{stdout}");
    }
    assert!(stdout.ends_with(&format!("report: {}\n", Path::new("out/report.html").display())));
    let lines = lines(&files[METRICS]);
    assert_eq!(lines.len() as u64, 2 * STEPS);
    for (i, line) in (0..).zip(&lines) {
        let step = i % STEPS + 1;
        assert_eq!(line["arm"], ["bf16", "mxfp4"][(i / STEPS) as usize]);
        assert_eq!(
            (&line["seed"], &line["step"], &line["tokens"]),
            (&Value::from(0), &Value::from(step), &Value::from(64 * step))
        );
        let positive = ["loss", "heldout", "lr", "grad_norm", "tokens_per_second", "peak_memory"];
        for key in positive {
            let value = line[key].as_f64().unwrap();
            assert!(value > 0.0 && (key != "loss" || value < 6.0), "{line}");
        }
        assert_eq!(line["counters"]["log2 of the loss scale"], 10.0);
        let underflowed = line["counters"]["gradients underflowed"].as_f64().unwrap();
        // The second half of the steps is dense.
        let packs = line["arm"] == "mxfp4" && step <= STEPS / 2;
        assert_eq!(underflowed > 0.0, packs, "{line}");
        assert_eq!(line["text"].is_string(), step == STEPS);
    }
    // It learns, and the arms see the same batches.
    let heldout = |i: u64| lines[i as usize]["heldout"].as_f64().unwrap();
    for first in [0, STEPS] {
        assert!(heldout(first) > 4.5 && heldout(first + STEPS - 1) < 4.3);
    }
    assert!((heldout(0) - heldout(STEPS)).abs() < 0.1);

    let report = std::str::from_utf8(&files[REPORT]).unwrap();
    for text in [
        "<h1>",
        "bf16",
        "mxfp4",
        "gap to bf16",
        "<svg",
        "Generated text",
        "underflowed",
        "--arms bf16,mxfp4",
    ] {
        assert!(report.contains(text), "the report lacks {text:?}");
    }
    assert!(report.contains("fn main()") && report.ends_with("</html>\n"));
    for text in ["<script", "src=", "@import", "url("] {
        assert!(!report.contains(text), "the report has {text:?}");
    }
    for name in CHECKPOINTS {
        let dir = Dir::with_text();
        dir.write("copy", &files[name]);
        let checkpoint = Checkpoint::load(&dir.path("copy")).unwrap();
        assert_eq!(checkpoint.value::<u64>("step").unwrap(), STEPS);
    }
}

/// What is done is left as it is; what does not belong to it is refused, with both sides.
#[test]
fn resuming_what_is_done_or_another_run() {
    let dir = Dir::with_text();
    for (name, bytes) in &whole().files {
        fs::create_dir_all(dir.path(name).parent().unwrap()).unwrap();
        dir.write(name, bytes);
    }
    dir.ok(&["--resume"]);
    dir.ends_like_the_whole_run();
    // An arm alone, which does not touch the other.
    dir.ok(&["--resume", "--arms", "mxfp4"]);
    dir.ends_like_the_whole_run();
    for (option, value, says) in [
        ("--steps", "9", ["its steps is", "8", "9"]),
        ("--lr", "0.5", ["its recipe is", "lr = 0.5", "lr = 0.001"]),
        ("--mtp", "1", ["its model is", "mtp: 1", "mtp: 0"]),
    ] {
        dir.fails(1, &[&says[..], &["bf16-0"]].concat(), &["--resume", option, value]);
    }
    dir.write("text.txt", &dir.read("text.txt").repeat(2));
    dir.fails(1, &["its data is", "bytes"], &["--resume"]);
    dir.ends_like_the_whole_run();
    // A checkpoint that is damaged, and there is none before it.
    let path = dir.path("out/bf16-0").join(LATEST);
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..1000]).unwrap();
    dir.fails(1, &[LATEST, "cut short"], &["--resume"]);
}

/// SIGKILL, at moments that differ from run to run of this test.
#[cfg(unix)]
#[test]
fn a_kill_changes_nothing() {
    let dir = Dir::with_text();
    let random = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let random = random.subsec_micros();
    eprintln!("seed {random}");
    // Within the first arm, then within the second.
    let moments = [1 + random as usize % 6, 9 + random as usize / 6 % 6];
    for (i, lines) in moments.into_iter().enumerate() {
        let mut child = dir.spawn(if i > 0 { &["--resume"] } else { &[] });
        dir.wait_for(lines, &mut child, Duration::from_micros(u64::from(random) % 60_000));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    dir.ok(&["--resume"]);
    dir.ends_like_the_whole_run();
}

/// Ctrl-C: the step is finished and saved, and the program says how to go on.
#[cfg(unix)]
#[test]
fn an_interrupt_saves() {
    let dir = Dir::with_text();
    // No checkpoints but those of the end.
    let mut child = dir.spawn(&["--save-every", "1000"]);
    dir.wait_for(2, &mut child, Duration::ZERO);
    let pid = child.id().to_string();
    let kill = std::process::Command::new("kill").args(["-INT", &pid]).status().unwrap();
    assert!(kill.success());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert!(stdout.contains("--resume with the same options goes on"), "{stdout}");
    assert!(stderr.contains("finishing the step") && stderr.contains("saved"), "{stderr}");
    assert!(dir.path("out/report.html").is_file());
    // Usually the first arm's; this thread may have waited for a processor.
    let second = usize::from(dir.path("out/mxfp4-0").exists());
    let checkpoint = Checkpoint::load(&dir.path(CHECKPOINTS[second])).unwrap();
    let steps = STEPS * second as u64 + checkpoint.value::<u64>("step").unwrap();
    assert!((2..2 * STEPS).contains(&steps) && dir.metrics().len() as u64 == steps, "{steps}");
    // A step that had ended, the one that was finished, and the end: of this arm, and no other began.
    let after: Vec<_> =
        stderr.split("finishing the step").nth(1).unwrap().lines().skip(1).collect();
    let arm = ["bf16 0 ", "mxfp4 0 "][second];
    assert!(after.len() <= 3 && after.iter().all(|line| line.starts_with(arm)), "{stderr}");
    // So does a limit of time.
    let stdout = dir.ok(&["--resume", "--max-seconds", "0"]);
    assert!(stdout.contains("goes on") && dir.metrics().len() as u64 == steps + 1, "{stdout}");
    dir.ok(&["--resume"]);
    dir.ends_like_the_whole_run();
}

/// What has no run to save does not wait for a step to end.
#[cfg(unix)]
#[test]
fn a_signal_ends_a_tuning() {
    use std::os::unix::process::ExitStatusExt;
    let dir = Dir::with_text();
    let mut child = dir.spawn(&["--tune", "mine.toml", "--arms", "mxfp4", "--steps", "1000000"]);
    // Kept open: the program goes on writing.
    let mut facts = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(facts.by_ref().map_while(Result::ok).any(|line| line.starts_with("command")));
    std::thread::sleep(Duration::from_millis(200));
    assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
    // Not SIGINT, which a shell has its jobs in the background ignore.
    let pid = child.id().to_string();
    let kill = std::process::Command::new("kill").args(["-TERM", &pid]).status().unwrap();
    assert!(kill.success());
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > Duration::from_secs(30) {
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(status.signal(), Some(15), "{status}");
    assert_eq!(dir.names(), ["text.txt"]);
}

/// As in `train … | head`.
#[test]
fn a_closed_pipe_is_quiet() {
    Dir::new("train").unread(&["--show-recipe", "mxfp4"]);
    Dir::new("info").unread(&["--device", "cpu"]);
}

/// An arm that diverges is told of and does not keep the others from running; without `--resume` all begins anew.
#[test]
fn an_arm_that_diverges() {
    let dir = Dir::with_text();
    let output = dir.run(&["--show-recipe", "mxfp4"]);
    let recipe = String::from_utf8(output.stdout).unwrap();
    let wild =
        recipe.replace("lr = 0.001", "lr = 1e15").replace("name = \"mxfp4\"", "name = \"wild\"");
    dir.write("wild.toml", wild.as_bytes());
    let mut child =
        dir.command(None, &with(&["--arms", "bf16", "--recipe", "wild.toml", "--steps", "3"]));
    let output = child.output().unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(stdout.contains("wild (diverged)"), "{stdout}");
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(stderr.contains("step 2: the loss is "), "{stderr}");
    dir.failed(output, 1, &["diverged: wild (seed 0)"]);
    let last = dir.metrics().pop().unwrap();
    assert!(last["arm"] == "wild" && last["step"] == 2 && last["loss"].is_null(), "{last}");
    assert_eq!(dir.metrics().len(), 5);
    // The other way round, and from the beginning.
    dir.fails(1, &["diverged"], &["--recipe", "wild.toml", "--arms", "mxfp8", "--steps", "2"]);
    assert_eq!(dir.metrics().len(), 4);
    assert!(dir.metrics().iter().all(|line| line["arm"] != "bf16"));
}

/// A limit on the size of files stands for the full disk.
#[cfg(unix)]
#[test]
fn a_full_disk() {
    let dir = Dir::with_text();
    let shell = "trap '' XFSZ; ulimit -f 1024; exec \"$0\" \"$@\"";
    let output = dir.command(Some(shell), &with(&["--arms", "bf16"])).output().unwrap();
    dir.failed(output, 1, &["latest.safetensors.tmp", "large"]);
    assert_eq!(fs::read_dir(dir.path("out/bf16-0")).unwrap().count(), 0, "remains");
    assert_eq!(dir.metrics().len(), 1);
}

#[test]
fn wrong_arguments() {
    let dir = Dir::with_text();
    dir.fails(1, &["no preset \"fp3\"", "mxfp4-backward", "--recipe"], &["--arms", "bf16,fp3"]);
    dir.fails(1, &["two arms", "\"bf16\""], &["--arms", "bf16,mxfp4,bf16"]);
    dir.fails(1, &["no model \"huge\"", "tiny, small, 10m, 30m"], &["--model", "huge"]);
    dir.fails(1, &["batch · seq is 66"], &["--seq", "33"]);
    dir.fails(1, &["No Such Device"], &["--device", "No Such Device"]);
    dir.fails(1, &["lr = -1"], &["--lr=-1"]);
    dir.fails(1, &["a profile needs a GPU with timestamps"], &["--profile"]);
    let nowhere = ["--tune", "no/such/folder/mine.toml", "--arms", "mxfp4"];
    dir.fails(1, &["cannot write no/such/folder/mine.toml"], &nowhere);
    dir.fails(2, &["--steps"], &["--steps=-1"]);
    dir.fails(2, &["--max-seconds"], &["--max-seconds", "soon"]);

    let recipe = String::from_utf8(dir.run(&["--show-recipe", "mxfp4"]).stdout).unwrap();
    let with_recipe = |text: &str, says: &[&str]| {
        dir.write("my.toml", text.as_bytes());
        dir.fails(1, says, &["--recipe", "my.toml"]);
    };
    with_recipe(&recipe.replace("clip_norm", "clip_morn"), &["my.toml", "clip_morn", "clip_norm"]);
    with_recipe(&recipe.replace("mxfp4\"\n", "mxfp3\"\n"), &["my.toml"]);
    with_recipe(&recipe.replace("\"rceil\"", "\"floor\""), &["my.toml", "does not clip"]);
    with_recipe(&recipe.replace("name = \"mxfp4\"", "name = \"../../mine\""), &["my.toml", "name"]);
    with_recipe("name = ", &["my.toml"]);
    assert!(recipe.starts_with("# late_forward = 0.5, late_backward = 0.5\n"), "{recipe}");
    let late = |value: &str| {
        recipe.replace("\nlate_backward = 0.5", &format!("\nlate_backward = {value}"))
    };
    with_recipe(&late("1.5"), &["my.toml", "late_backward = 1.5", "a share of the steps"]);
    with_recipe(&late("\"all\""), &["my.toml", "late_backward", "expected f32"]);
    with_recipe(&late("0.1").replace("backward =", "backwards ="), &["my.toml", "late_backwards"]);
    with_recipe(&recipe, &["two arms", "\"mxfp4\""]);
    dir.fails(1, &["none.toml"], &["--recipe", "none.toml"]);

    fs::create_dir(dir.path("folder")).unwrap();
    dir.write("empty.txt", b"");
    dir.write("short.txt", b"too short");
    dir.write("image.bin", &[0; 5000]);
    dir.fails(1, &["none.txt"], &["--data", "none.txt"]);
    dir.fails(1, &["empty.txt"], &["--data", "empty.txt"]);
    dir.fails(1, &["folder"], &["--data", "folder"]);
    dir.fails(1, &["image.bin", "not text"], &["--data", "image.bin"]);
    dir.fails(1, &["9 bytes", "add text"], &["--data", "short.txt"]);
    // What is there is not written over, and nothing is left but what was there.
    dir.fails(1, &["text.txt"], &["--out", "text.txt"]);
    assert_eq!(
        dir.names(),
        ["empty.txt", "folder", "image.bin", "my.toml", "short.txt", "text.txt"]
    );
}
