//! Text to train on: the bytes of files, cut into windows, visited in an order that needs no state.
//!
//! A [`Corpus`] is text, one token a byte; files are joined with a zero byte, which no text contains. [`Batches`] cuts it
//! into consecutive windows of `seq + 1 + extra` bytes: `seq` inputs, their targets one byte on, and `extra` more for the
//! prediction of several tokens. A seeded permutation of all windows, the same whatever the seed of a run, puts the last
//! few of them apart as held-out text; windows do not overlap, so no byte of these is ever trained on. Of the others,
//! every epoch visits each once, in an order that is a pure function of (seed, epoch, position). So a run goes on from
//! nothing but its step number, and runs of the same seed see the same text, whatever else differs between them.
//!
//! Layout: a batch is `[batch, window]` tokens, row-major. **Exact**: the same text and numbers give the same batches
//! everywhere.

use std::collections::HashSet;
use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::rng::{self, threefry4x32};
use crate::{Error, Result};

/// The token between two files.
pub const SEPARATOR: u8 = 0;
/// The number of tokens: one for each byte.
pub const VOCABULARY: usize = 256;

/// How much text is read.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The most bytes of the corpus. Where there is more text, files are drawn from all of it, always the same ones.
    pub bytes: usize,
    /// Files of directories that are larger are left out; files that are named themselves are not.
    pub file_bytes: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { bytes: usize::MAX, file_bytes: 4 << 20 }
    }
}

/// Text, and where it comes from.
#[derive(Clone, Debug)]
pub struct Corpus {
    bytes: Vec<u8>,
    fingerprint: u64,
    files: usize,
    left_out: LeftOut,
}

/// Files that were found and not taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// Larger than [`Limits::file_bytes`].
    pub large: usize,
    /// With a zero byte, or not UTF-8.
    pub not_text: usize,
    /// Most of which is in others that were taken: more than half of the bytes of their long lines.
    pub duplicates: usize,
    /// Beyond [`Limits::bytes`].
    pub beyond: usize,
}

impl Corpus {
    /// The text of files, and of the files in directories, recursively. In directories what is hidden, a link, or marked
    /// as a cache (`CACHEDIR.TAG`, as Cargo does with `target`) is left out. The order is that of the sorted paths.
    pub fn from_paths(paths: &[PathBuf], limits: &Limits) -> Result<Corpus> {
        let mut left_out = LeftOut::default();
        let mut found = Vec::new();
        for path in paths {
            let about = fs::metadata(path).map_err(Error::at(path))?;
            if about.is_dir() {
                found.extend(walk(path, limits.file_bytes, |_| true, &mut left_out)?);
            } else if about.is_file() {
                found.push(path.clone());
            } else {
                return Err(nothing(format!("{} is no file or directory", path.display())));
            }
        }
        found.sort();
        found.dedup();
        // Drawn at random, so that a limit does not leave the first names of the alphabet.
        let order = Permutation::new(found.len() as u64, 0, FILES);
        let mut taken: Vec<(usize, Vec<u8>)> = Vec::new();
        let mut seen = Lines::default();
        let mut room = limits.bytes;
        for place in 0..found.len() {
            // The separator takes one, except before the first.
            let room_here = room.saturating_sub(usize::from(!taken.is_empty()));
            if room_here == 0 {
                left_out.beyond = found.len() - place;
                break;
            }
            let index = order.at(place as u64) as usize;
            let path = &found[index];
            let mut text = Vec::new();
            let file = File::open(path).map_err(Error::at(path))?;
            file.take(room_here as u64).read_to_end(&mut text).map_err(Error::at(path))?;
            if text.is_empty() {
                continue;
            }
            if !is_text(&text) {
                left_out.not_text += 1;
                continue;
            }
            if !seen.mostly_new(&text) {
                left_out.duplicates += 1;
                continue;
            }
            room = room_here - text.len();
            taken.push((index, text));
        }
        if taken.is_empty() {
            let names: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
            return Err(nothing(match (&names[..], found.len()) {
                ([], _) => "no files or directories are named".into(),
                (names, 0) => {
                    format!("no file to read in {}: {left_out}", names.join(", "))
                }
                (names, n) => {
                    format!("none of {n} files in {} holds text: {left_out}", names.join(", "))
                }
            }));
        }
        taken.sort();
        let files = taken.len();
        let mut bytes =
            Vec::with_capacity(taken.iter().map(|(_, text)| text.len() + 1).sum::<usize>() - 1);
        for (_, text) in taken {
            if !bytes.is_empty() {
                bytes.push(SEPARATOR);
            }
            bytes.extend(text);
        }
        Ok(Corpus { files, left_out, ..Corpus::from_bytes(bytes) })
    }

    /// These bytes, whatever they are.
    pub fn from_bytes(bytes: Vec<u8>) -> Corpus {
        Corpus { fingerprint: hash(&bytes), bytes, files: 1, left_out: LeftOut::default() }
    }

    /// The text.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// A hash of the text, by which a run that goes on can tell that its text is still the same (FNV-1a, 64 bits).
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// How many files were taken.
    pub fn files(&self) -> usize {
        self.files
    }

    /// Which were not.
    pub fn left_out(&self) -> LeftOut {
        self.left_out
    }
}

/// The lines of all files that were taken, by their hashes. Machines hold many copies of a package, of one version or another:
/// a loss on text that was all but seen says little.
#[derive(Default)]
struct Lines {
    seen: HashSet<u64>,
}

impl Lines {
    /// Shorter lines (braces, `else`) are the same everywhere.
    const LONG: usize = 16;

    /// Whether at most half of the text's long lines are there, counted by bytes; then adds them. A text without long lines
    /// counts as one line.
    fn mostly_new(&mut self, text: &[u8]) -> bool {
        let long = || text.split(|byte| *byte == b'\n').filter(|line| line.len() >= Self::LONG);
        let mut hashes: Vec<(u64, usize)> = long().map(|line| (hash(line), line.len())).collect();
        if hashes.is_empty() {
            hashes.push((hash(text), text.len()));
        }
        let all: usize = hashes.iter().map(|(_, len)| len).sum();
        let known = hashes.iter().filter(|(hash, _)| self.seen.contains(hash));
        let old: usize = known.map(|(_, len)| len).sum();
        let new = 2 * old <= all;
        if new {
            self.seen.extend(hashes.iter().map(|(hash, _)| hash));
        }
        new
    }
}

/// `3.2 MB of text in 57 files (left out: 2 mostly seen before)`.
impl fmt::Display for Corpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.bytes.len() as f64 {
            b if b >= 1e9 => write!(f, "{:.2} GB", b / 1e9)?,
            b if b >= 1e6 => write!(f, "{:.1} MB", b / 1e6)?,
            b if b >= 1e3 => write!(f, "{:.1} kB", b / 1e3)?,
            b => write!(f, "{b} bytes")?,
        }
        write!(f, " of text in {} file{}", self.files, if self.files == 1 { "" } else { "s" })?;
        match self.left_out == LeftOut::default() {
            true => Ok(()),
            false => write!(f, " (left out: {})", self.left_out),
        }
    }
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = [
            (self.large, "too large"),
            (self.not_text, "not text"),
            (self.duplicates, "mostly seen before"),
            (self.beyond, "beyond the limit"),
        ];
        let words: Vec<_> =
            counts.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")).collect();
        match words.is_empty() {
            true => write!(f, "nothing left out"),
            false => write!(f, "{}", words.join(", ")),
        }
    }
}

/// The sources of the packages that Cargo has fetched, which every machine that built this crate has: files of
/// `$CARGO_HOME/registry/src` (or `~/.cargo`) that end in .rs, .md, .toml or .txt and are not larger than the default
/// [`Limits::file_bytes`]. They differ between machines: [`Corpus::fingerprint`] tells.
pub fn cargo_sources() -> Result<Vec<PathBuf>> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| std::env::home_dir().map(|home| home.join(".cargo")));
    let Some(root) = home.map(|home| home.join("registry").join("src")) else {
        return Err(nothing("neither CARGO_HOME nor a home directory is known".into()));
    };
    let advice = "run `cargo fetch`, or name files or directories with text";
    if !root.is_dir() {
        return Err(nothing(format!("Cargo has no sources in {}; {advice}", root.display())));
    }
    let wanted = |path: &Path| {
        let extension = path.extension().and_then(|extension| extension.to_str());
        matches!(extension, Some("rs" | "md" | "toml" | "txt"))
    };
    let mut left_out = LeftOut::default();
    let mut found = walk(&root, Limits::default().file_bytes, wanted, &mut left_out)?;
    found.sort();
    match found.is_empty() {
        true => Err(nothing(format!("Cargo has no sources in {}; {advice}", root.display()))),
        false => Ok(found),
    }
}

fn nothing(problem: String) -> Error {
    Error::Mismatch { operation: "training data", problem }
}

/// The regular files of a directory that are `wanted`, in no order.
fn walk(
    root: &Path,
    file_bytes: u64,
    wanted: impl Fn(&Path) -> bool,
    left_out: &mut LeftOut,
) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut directories = vec![root.to_path_buf()];
    while let Some(directory) = directories.pop() {
        if directory.join("CACHEDIR.TAG").is_file() {
            continue;
        }
        for entry in fs::read_dir(&directory).map_err(Error::at(&directory))? {
            let entry = entry.map_err(Error::at(&directory))?;
            let path = entry.path();
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                continue;
            }
            // Of links this is neither, so that no cycle is walked.
            let kind = entry.file_type().map_err(Error::at(&path))?;
            if kind.is_dir() {
                directories.push(path);
            } else if kind.is_file() && wanted(&path) {
                match entry.metadata().map_err(Error::at(&path))?.len() {
                    0 => {}
                    size if size > file_bytes => left_out.large += 1,
                    _ => found.push(path),
                }
            }
        }
    }
    Ok(found)
}

/// UTF-8 without zero bytes; the last character may be cut.
fn is_text(bytes: &[u8]) -> bool {
    let utf8 = match std::str::from_utf8(bytes) {
        Ok(_) => true,
        Err(error) => error.error_len().is_none(),
    };
    utf8 && !bytes.contains(&0)
}

/// FNV-1a, 64 bits.
fn hash(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
}

/// A pseudo-random permutation of `0..n`, computed place by place: a Feistel network on the smallest even number of bits
/// that holds `n`, walked on until it lands below `n` (Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
/// CT-RSA 2002). Its round function is the crate's generator.
#[derive(Clone, Copy, Debug)]
struct Permutation {
    n: u64,
    half: u32,
    key: [u32; 4],
}

/// Streams that are no epoch's.
const FILES: u64 = u64::MAX;
const SPLIT: u64 = u64::MAX - 1;
/// Keeps the draws apart from those of stochastic rounding, where this word of the counter is 0.
const DOMAIN: u32 = u32::from_le_bytes(*b"data");

impl Permutation {
    fn new(n: u64, seed: u64, stream: u64) -> Permutation {
        let bits = u64::BITS - n.saturating_sub(1).leading_zeros();
        Permutation {
            n,
            half: bits.max(2).div_ceil(2),
            key: [seed as u32, (seed >> 32) as u32, stream as u32, (stream >> 32) as u32],
        }
    }

    /// The image of `i`, which is below `n`.
    fn at(&self, i: u64) -> u64 {
        debug_assert!(i < self.n);
        let mut x = i;
        loop {
            x = self.feistel(x);
            if x < self.n {
                return x;
            }
        }
    }

    fn feistel(&self, x: u64) -> u64 {
        let mask = (1 << self.half) - 1;
        let (mut left, mut right) = (x >> self.half, x & mask);
        for round in 0..8 {
            let word = threefry4x32::<{ rng::ROUNDS }>([right as u32, round, DOMAIN, 0], self.key);
            (left, right) = (right, left ^ (u64::from(word[0]) & mask));
        }
        left << self.half | right
    }
}

/// How a corpus is cut.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BatchesDesc {
    /// Seeds the order of the training windows; the held-out ones are the same for all seeds.
    pub seed: u64,
    /// Windows in a batch.
    pub batch: usize,
    /// Inputs of a window.
    pub seq: usize,
    /// Targets of a window beyond the next one: one less than the tokens that each position predicts.
    pub extra: usize,
    /// The share of the windows that are held out, rounded to whole batches, at least one.
    pub held_out: f64,
}

impl Default for BatchesDesc {
    fn default() -> BatchesDesc {
        BatchesDesc { seed: 0, batch: 16, seq: 256, extra: 0, held_out: 0.01 }
    }
}

/// The batches of a corpus: those of training by step, those of the held-out text by number.
#[derive(Clone, Debug)]
pub struct Batches {
    corpus: Arc<Corpus>,
    desc: BatchesDesc,
    split: Permutation,
    train: u64,
}

impl Batches {
    /// Cuts a corpus. It must hold a batch of held-out windows and one of training.
    pub fn new(corpus: Arc<Corpus>, desc: &BatchesDesc) -> Result<Batches> {
        let BatchesDesc { batch, seq, extra, held_out, .. } = *desc;
        let mismatch = |problem| Error::Mismatch { operation: "Batches::new", problem };
        if batch == 0 || seq == 0 {
            return Err(mismatch(format!("batch={batch} and seq={seq} must be at least 1")));
        }
        if !(0.0..1.0).contains(&held_out) {
            return Err(mismatch(format!(
                "held_out={held_out} must be a share, from 0 to below 1"
            )));
        }
        let window = seq.checked_add(1).and_then(|n| n.checked_add(extra));
        let needed = window.and_then(|window| batch.checked_add(1)?.checked_mul(window));
        let (Some(window), Some(needed)) = (window, needed) else {
            return Err(mismatch(format!("batch={batch}, seq={seq}, extra={extra} are too large")));
        };
        if corpus.bytes.len() < needed {
            return Err(mismatch(format!(
                "the text has {} bytes, but {batch} held-out windows and one to train on, of {window} bytes each, need \
                 {needed}; add text, or make batch or seq smaller",
                corpus.bytes.len()
            )));
        }
        let windows = corpus.bytes.len() / window;
        let batches = (held_out * windows as f64 / batch as f64).round() as usize;
        let held_out = batch * batches.clamp(1, (windows - 1) / batch);
        Ok(Batches {
            corpus,
            desc: *desc,
            split: Permutation::new(windows as u64, 0, SPLIT),
            train: (windows - held_out) as u64,
        })
    }

    /// What was asked for.
    pub fn desc(&self) -> &BatchesDesc {
        &self.desc
    }

    /// The text.
    pub fn corpus(&self) -> &Arc<Corpus> {
        &self.corpus
    }

    /// The tokens of a window: `seq + 1 + extra`.
    pub fn window(&self) -> usize {
        self.desc.seq + 1 + self.desc.extra
    }

    /// The training batch of a step, `[batch, window]`, however many steps that is: an epoch follows another.
    pub fn batch(&self, step: u64) -> Vec<u32> {
        let first = u128::from(step) * self.desc.batch as u128;
        let mut tokens = Vec::with_capacity(self.desc.batch * self.window());
        for sample in first..first + self.desc.batch as u128 {
            let (epoch, place) = (sample / u128::from(self.train), sample % u128::from(self.train));
            let order = Permutation::new(self.train, self.desc.seed, epoch as u64);
            self.push(order.at(place as u64), &mut tokens);
        }
        tokens
    }

    /// How many batches of held-out text there are. The first few are as good a sample as any.
    pub fn held_out_batches(&self) -> usize {
        (self.split.n - self.train) as usize / self.desc.batch
    }

    /// A batch of held-out text, `[batch, window]`: the same for every seed. The number counts from 0, and begins again
    /// after the last.
    pub fn held_out(&self, number: usize) -> Vec<u32> {
        let first = (number % self.held_out_batches() * self.desc.batch) as u64;
        let mut tokens = Vec::with_capacity(self.desc.batch * self.window());
        for place in first..first + self.desc.batch as u64 {
            self.push(self.train + place, &mut tokens);
        }
        tokens
    }

    /// How often the training text has been gone through before a step.
    pub fn epoch(&self, step: u64) -> f64 {
        step as f64 * self.desc.batch as f64 / self.train as f64
    }

    /// The bytes of training text: what an epoch holds without a repetition.
    pub fn unique_bytes(&self) -> u64 {
        self.train * self.window() as u64
    }

    /// The entropy of the held-out bytes by themselves, in nats a byte: the loss of a model that has learnt how frequent
    /// each byte is, and nothing else.
    pub fn unigram_entropy(&self) -> f64 {
        let mut counts = [0u64; VOCABULARY];
        for place in self.train..self.split.n {
            self.bytes(place).iter().for_each(|byte| counts[usize::from(*byte)] += 1);
        }
        let total = counts.iter().sum::<u64>() as f64;
        let shares = counts.iter().filter(|n| **n > 0).map(|n| *n as f64 / total);
        shares.map(|share| -share * share.ln()).sum()
    }

    /// The window at a place of the split: training below `train`, held out from there on.
    fn bytes(&self, place: u64) -> &[u8] {
        let start = self.split.at(place) as usize * self.window();
        &self.corpus.bytes[start..start + self.window()]
    }

    fn push(&self, place: u64, tokens: &mut Vec<u32>) {
        tokens.extend(self.bytes(place).iter().map(|byte| u32::from(*byte)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permutations_are_bijections() {
        for n in (1..70).chain([100, 127, 128, 129, 1000, 4095, 4097]) {
            for (seed, stream) in [(0, 0), (1, 0), (0, 1), (u64::MAX, SPLIT)] {
                let permutation = Permutation::new(n, seed, stream);
                let mut images: Vec<_> = (0..n).map(|i| permutation.at(i)).collect();
                let moved = images.iter().enumerate().filter(|(i, x)| *i as u64 != **x).count();
                assert!(n < 100 || moved > n as usize * 9 / 10, "{n}: {moved} moved");
                images.sort_unstable();
                assert!(images.iter().copied().eq(0..n), "n={n} seed={seed} stream={stream}");
            }
        }
        // The whole range of places.
        let wide = Permutation::new(u64::MAX, 3, 4);
        assert_ne!(wide.at(0), wide.at(u64::MAX - 1));
    }

    /// Every pair of neighbours comes about equally often: χ² of the first two images of 5 over 2000 keys, 20 outcomes;
    /// the bound is the 99.99% quantile for 19 degrees of freedom.
    #[test]
    fn permutations_are_even() {
        let mut counts = [0f64; 25];
        for seed in 0..2000 {
            let permutation = Permutation::new(5, seed, 9);
            counts[(permutation.at(0) * 5 + permutation.at(1)) as usize] += 1.0;
        }
        let chi2: f64 =
            counts.iter().filter(|n| **n > 0.0).map(|n| (n - 100.0).powi(2) / 100.0).sum();
        assert_eq!(counts.iter().filter(|n| **n > 0.0).count(), 20);
        assert!(chi2 < 50.8, "{chi2}");
    }

    /// The batches of a run that goes on must be those of the run that began: changing these is a breaking release.
    #[test]
    fn value_stability() {
        let permutation = Permutation::new(1000, 42, 7);
        let images: Vec<_> = (0..6).map(|i| permutation.at(i)).collect();
        assert_eq!(images, [423, 196, 628, 483, 800, 282]);
        assert_eq!(hash(b"foobar"), 0x8594_4171_f739_67e8); // the known answer of FNV's authors
    }

    /// Text in which every window of three bytes is another.
    fn counted(windows: u32) -> Arc<Corpus> {
        Arc::new(Corpus::from_bytes(
            (0..windows).flat_map(|i| i.to_be_bytes()[1..].to_vec()).collect(),
        ))
    }

    fn ids(tokens: &[u32]) -> Vec<u32> {
        tokens.chunks(3).map(|t| t[0] << 16 | t[1] << 8 | t[2]).collect()
    }

    #[test]
    fn held_out_windows_are_never_trained_on() {
        for (windows, batch, share) in [(1000, 4, 0.1), (1003, 7, 0.01), (9, 8, 0.5), (50, 3, 0.99)]
        {
            let desc = BatchesDesc { seed: 5, batch, seq: 1, extra: 1, held_out: share };
            let batches = Batches::new(counted(windows), &desc).unwrap();
            let count = batches.held_out_batches();
            assert!(count > 0 && batches.train > 0);
            let held: HashSet<u32> = (0..count).flat_map(|i| ids(&batches.held_out(i))).collect();
            assert_eq!(held.len(), count * batch);
            assert_eq!(batches.held_out(count), batches.held_out(0));
            let steps = 3 * batches.train / batch as u64 + 2;
            let seen: Vec<u32> = (0..steps).flat_map(|s| ids(&batches.batch(s))).collect();
            assert!(seen.iter().all(|id| !held.contains(id)));
            // Each epoch visits each of the others once, in an order of its own.
            let epochs: Vec<&[u32]> = seen.chunks_exact(batches.train as usize).collect();
            for epoch in &epochs {
                let distinct: HashSet<_> = epoch.iter().collect();
                assert_eq!(distinct.len() as u64, batches.train);
            }
            assert_eq!(batches.train + held.len() as u64, u64::from(windows));
            assert!(windows < 500 || epochs[0] != epochs[1]);
            assert_eq!(batches.unique_bytes(), 3 * batches.train);
            assert_eq!(batches.epoch(batches.train), batch as f64);
        }
    }

    #[test]
    fn batches_depend_on_seed_and_step_alone() {
        let desc = BatchesDesc { seed: 1, batch: 4, seq: 2, extra: 0, held_out: 0.1 };
        let make = |desc: &BatchesDesc| Batches::new(counted(400), desc).unwrap();
        let (a, b) = (make(&desc), make(&desc));
        let late = b.batch(77);
        let all: Vec<_> = (0..78).map(|step| a.batch(step)).collect();
        assert_eq!(all[77], late);
        let other = make(&BatchesDesc { seed: 2, ..desc });
        assert_ne!(other.batch(77), late);
        assert_eq!(other.held_out(1), a.held_out(1));
    }

    #[test]
    fn entropy_of_one_and_of_four_letters() {
        let desc = BatchesDesc { batch: 2, seq: 7, held_out: 0.5, ..Default::default() };
        let of = |text: &[u8]| {
            let corpus = Arc::new(Corpus::from_bytes(text.repeat(100)));
            Batches::new(corpus, &desc).unwrap().unigram_entropy()
        };
        assert_eq!(of(b"aaaa"), 0.0);
        assert!((of(b"abcd") - 4f64.ln()).abs() < 1e-12);
    }

    #[test]
    fn too_little_text_says_how_much_is_needed() {
        let desc = BatchesDesc { batch: 4, seq: 8, extra: 1, ..Default::default() };
        let make = |bytes| Batches::new(Arc::new(Corpus::from_bytes(vec![b'x'; bytes])), &desc);
        let error = make(49).unwrap_err().to_string();
        assert!(error.contains("49 bytes") && error.contains("need 50"), "{error}");
        assert_eq!(make(50).unwrap().batch(0), [120; 40]);
        for wrong in [
            BatchesDesc { batch: 0, ..desc },
            BatchesDesc { seq: 0, ..desc },
            BatchesDesc { seq: usize::MAX, ..desc },
            BatchesDesc { held_out: 1.0, ..desc },
            BatchesDesc { held_out: f64::NAN, ..desc },
        ] {
            assert!(Batches::new(counted(100), &wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn files_are_sorted_and_others_left_out() {
        let root = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &[u8]| {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put("b.txt", b"second");
        put("a/z.rs", "fürst".as_bytes());
        put("c.txt", b"second");
        put("c.bin", b"nul\0");
        put("d.bin", b"\xff\xfe");
        put("empty", b"");
        put("large", &[b'x'; 100]);
        put(".git/config", b"hidden");
        put(".hidden", b"hidden");
        put("target/CACHEDIR.TAG", b"Signature");
        put("target/made.txt", b"made");
        let limits = Limits { file_bytes: 99, ..Default::default() };
        let paths = [root.path().to_path_buf()];
        let corpus = Corpus::from_paths(&paths, &limits).unwrap();
        assert_eq!(corpus.bytes(), "fürst\0second".as_bytes());
        assert_eq!((corpus.files(), corpus.fingerprint()), (2, hash(corpus.bytes())));
        let left_out = LeftOut { large: 1, not_text: 2, duplicates: 1, beyond: 0 };
        assert_eq!(corpus.left_out(), left_out);
        assert_eq!(
            corpus.to_string(),
            "13 bytes of text in 2 files (left out: 1 too large, 2 not text, 1 mostly seen before)"
        );
        // Files that are named are read whatever their size, and once.
        let large = root.path().join("large");
        let named = [large.clone(), large, paths[0].join("a")];
        assert_eq!(Corpus::from_paths(&named, &limits).unwrap().bytes().len(), 107);
        // A limit holds to the byte.
        for bytes in 1..14 {
            let corpus = Corpus::from_paths(&paths, &Limits { bytes, ..limits }).unwrap();
            assert!(corpus.bytes().len() == bytes.min(13) || bytes == 7, "{bytes}");
        }
    }

    #[test]
    fn what_is_mostly_seen_is_left_out() {
        let mut lines = Lines::default();
        let license = "a license of some length, in every file\n";
        let file = |name: &str, n: usize| {
            let body: String =
                (0..n).map(|i| format!("    let {name}_{i} = {i}; // long\n}}\n")).collect();
            format!("{license}{body}")
        };
        assert!(lines.mostly_new(file("one", 10).as_bytes()));
        assert!(!lines.mostly_new(file("one", 10).as_bytes()));
        assert!(!lines.mostly_new(file("one", 11).as_bytes()));
        assert!(lines.mostly_new(file("two", 10).as_bytes()));
        assert!(lines.mostly_new(file("one", 25).as_bytes()));
        assert!(lines.mostly_new(b"short\n\nlines\n") && !lines.mostly_new(b"short\n\nlines\n"));
    }

    #[test]
    fn errors_name_the_path() {
        let root = tempfile::tempdir().unwrap();
        let fails = |paths: &[PathBuf]| {
            Corpus::from_paths(paths, &Limits::default()).unwrap_err().to_string()
        };
        assert!(fails(&[]).contains("no files or directories are named"));
        let shown = root.path().display().to_string();
        assert!(fails(&[root.path().into()]).contains(&shown));
        assert!(fails(&[root.path().join("missing")]).contains("missing"));
        fs::write(root.path().join("x"), [0; 9]).unwrap();
        let error = fails(&[root.path().join("x")]);
        assert!(error.contains("1 not text"), "{error}");
    }
}
