//! Checkpoints under everything that happens to files: kills, full disks, cuts, other files in their place.
#![cfg(feature = "safetensors")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use microscaling::Error;
use microscaling::interop::safetensors::{Dtype, TensorFile};
use microscaling::train::checkpoint::{Checkpoint, LATEST, PREVIOUS, VERSION_KEY};

/// The state at a step; what a step's tensors hold follows from it.
fn state(step: u64, bytes: usize) -> Checkpoint {
    let mut checkpoint = Checkpoint::default();
    checkpoint.meta.insert("step".into(), step.to_string());
    checkpoint.meta.insert("text \"quoted\"".into(), "ä\n".into());
    checkpoint.insert("w", Dtype::U8, &[bytes], vec![step as u8; bytes]).unwrap();
    checkpoint.insert("empty", Dtype::F32, &[0, 4], Vec::new()).unwrap();
    checkpoint.insert("scalar", Dtype::F32, &[], f32::NAN.to_le_bytes().to_vec()).unwrap();
    checkpoint
}

fn step(checkpoint: &Checkpoint) -> u64 {
    checkpoint.value("step").unwrap()
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_is_loaded_is_what_was_saved() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    let mut saved = state(3, 1000);
    saved.save(&path).unwrap();
    let first = fs::read(&path).unwrap();
    let mut loaded = Checkpoint::load(&path).unwrap();
    assert_eq!(loaded, saved);
    loaded.save(&path).unwrap();
    assert_eq!(fs::read(&path).unwrap(), first);
    assert_eq!(names(dir.path()), ["a.safetensors"]);

    assert_eq!(loaded.take("w", Dtype::U8, &[1000]).unwrap(), [3; 1000]);
    let error = |result: microscaling::Result<Vec<u8>>| result.unwrap_err().to_string();
    assert!(error(loaded.take("w", Dtype::U8, &[1000])).contains("no tensor \"w\""));
    let other = error(saved.take("w", Dtype::BF16, &[500]));
    assert!(other.contains("U8 [1000]") && other.contains("BF16 [500]"), "{other}");
    assert!(saved.insert("w", Dtype::U8, &[1], vec![0]).is_err());
    assert!(saved.insert("v", Dtype::F32, &[2], vec![0; 7]).is_err());
    assert!(saved.insert("v", Dtype::F32, &[usize::MAX, 2], vec![]).is_err());
    assert!(
        saved.value::<u64>("missing").is_err() && saved.value::<u64>("text \"quoted\"").is_err()
    );
}

#[test]
fn two_are_kept() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("run/deep");
    assert!(Checkpoint::load_latest(&dir).unwrap().is_none());
    for n in 1..=3 {
        state(n, 100).save_latest(&dir).unwrap();
        let found = Checkpoint::load_latest(&dir).unwrap().unwrap();
        assert_eq!(step(&found.checkpoint), n);
        assert!(found.passed_over.is_none() && found.path == dir.join(LATEST));
    }
    assert_eq!(step(&Checkpoint::load(&dir.join(PREVIOUS)).unwrap()), 2);
    assert_eq!(names(&dir), [LATEST, PREVIOUS]);

    // Between the renames there is no latest one.
    fs::rename(dir.join(LATEST), dir.join("elsewhere")).unwrap();
    let found = Checkpoint::load_latest(&dir).unwrap().unwrap();
    assert!(step(&found.checkpoint) == 2 && found.passed_over.is_none());
    state(4, 100).save_latest(&dir).unwrap();
    assert_eq!(step(&Checkpoint::load(&dir.join(PREVIOUS)).unwrap()), 2);

    // A damaged latest one is told of.
    fs::write(dir.join(LATEST), b"").unwrap();
    let found = Checkpoint::load_latest(&dir).unwrap().unwrap();
    assert!(step(&found.checkpoint) == 2 && found.passed_over.is_some());
    fs::write(dir.join(PREVIOUS), b"").unwrap();
    let error = Checkpoint::load_latest(&dir).unwrap_err().to_string();
    assert!(error.contains(LATEST), "{error}");
}

#[test]
fn cut_short_is_an_error_at_every_length() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(LATEST);
    state(1, 5000).save(&path).unwrap();
    let whole = fs::read(&path).unwrap();
    for len in (0..whole.len()).filter(|len| *len < 600 || len % 97 == 0 || *len + 9 > whole.len())
    {
        fs::write(&path, &whole[..len]).unwrap();
        let error = Checkpoint::load(&path).unwrap_err().to_string();
        assert!(error.contains(LATEST) && error.contains("cut short"), "{len}: {error}");
    }
    fs::write(&path, [&whole[..], b"more"].concat()).unwrap();
    assert!(Checkpoint::load(&path).is_err());
}

#[test]
fn other_files_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let mut file = TensorFile::default();
    let mut load = |version: Option<&str>| {
        if let Some(version) = version {
            file.metadata.insert(VERSION_KEY.into(), version.into());
        }
        let mut bytes = Vec::new();
        file.write_to(&mut bytes).unwrap();
        fs::write(&path, bytes).unwrap();
        Checkpoint::load(&path)
    };
    assert!(load(None).unwrap_err().to_string().contains("no checkpoint"));
    let error = load(Some("2")).unwrap_err().to_string();
    assert!(error.contains("version \"2\"") && error.contains("reads \"1\""), "{error}");
    assert_eq!(load(Some("1")).unwrap(), Checkpoint::default());
    let missing = Checkpoint::load(&dir.path().join("missing")).unwrap_err();
    assert!(matches!(missing, Error::Io { .. }), "{missing}");
    fs::write(&path, "a text").unwrap();
    assert!(Checkpoint::load(&path).unwrap_err().to_string().contains("no .safetensors file"));
}

const BYTES: usize = 3 << 20;

/// Not a test by itself: what [`kills_leave_a_checkpoint`] and [`full_disks_leave_the_old_one`] run and watch.
#[test]
fn child() {
    let (Ok(role), Ok(dir)) = (std::env::var("CHECKPOINT_CHILD"), std::env::var("CHECKPOINT_DIR"))
    else {
        return;
    };
    let dir = Path::new(&dir);
    match role.as_str() {
        "loop" => {
            let last = Checkpoint::load_latest(dir).unwrap().map_or(0, |f| step(&f.checkpoint));
            for n in last + 1.. {
                state(n, BYTES).save_latest(dir).unwrap();
                println!("saved {n}");
            }
        }
        "full" => {
            let error = state(2, BYTES).save_latest(dir).unwrap_err();
            assert!(matches!(error, Error::Io { .. }), "{error}");
            println!("full: {error}");
        }
        _ => panic!("{role}"),
    }
}

/// A child saves in a loop and is killed at one moment after another: what it said it saved is there, whole.
#[test]
fn kills_leave_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let mut saved = 0;
    for round in 0..30 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture"])
            .env("CHECKPOINT_CHILD", "loop")
            .env("CHECKPOINT_DIR", dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let number =
            |line: &String| line.split("saved ").nth(1).map(|n| n.trim().parse::<u64>().unwrap());
        saved = lines.by_ref().find_map(|line| number(&line)).unwrap();
        std::thread::sleep(std::time::Duration::from_micros(700 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        // What it managed to say before the end.
        saved = lines.filter_map(|line| number(&line)).fold(saved, u64::max);
        let found = Checkpoint::load_latest(dir.path()).unwrap().unwrap();
        assert!(found.passed_over.is_none(), "{:?}", found.passed_over);
        let n = step(&found.checkpoint);
        // A kill between the renames leaves the one before what was about to be.
        assert!(n == saved || n == saved + 1, "saved {saved}, found {n}");
        assert_eq!(found.checkpoint, state(n, BYTES));
    }
    assert!(saved >= 30);
    // Remains of the kills are overwritten, not heaped up.
    state(saved + 2, 9).save_latest(dir.path()).unwrap();
    assert_eq!(names(dir.path()), [LATEST, PREVIOUS]);
}

/// A limit on the size of files stands for the full disk: the write fails half way.
#[cfg(unix)]
#[test]
fn full_disks_leave_the_old_one() {
    let dir = tempfile::tempdir().unwrap();
    state(1, 100).save_latest(dir.path()).unwrap();
    // 512 KiB. The signal is ignored, so that the write returns an error, as on a full disk.
    let out = Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 1024; exec \"$0\" --exact child --nocapture"])
        .arg(std::env::current_exe().unwrap())
        .env("CHECKPOINT_CHILD", "full")
        .env("CHECKPOINT_DIR", dir.path())
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && told.contains("full: "), "{out:?}");
    assert!(told.contains("latest.safetensors.tmp"), "{told}");
    assert_eq!(step(&Checkpoint::load_latest(dir.path()).unwrap().unwrap().checkpoint), 1);
    assert_eq!(names(dir.path()), [LATEST]);
}
