//! The program `examples/quantize.rs` as its users run it: files in, files out, messages and exit codes.
#![cfg(feature = "safetensors")]

mod common;

use std::collections::HashMap;
use std::path::Path;

use common::cli::Dir;
use common::{assert_bytes, gaussian, to_f32};
use microscaling::formats::NAMED;
use microscaling::interop::safetensors::TensorFile;
use microscaling::{
    Axis, Block, DType, MXFP4, MxSpec, MxTensor, QuantizeDesc, Rounding, ScaleRule,
};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

impl Dir {
    /// Runs on the CPU engine, which must succeed without a warning; returns what it printed.
    #[track_caller]
    fn ok(&self, args: &[&str]) -> String {
        let output = self.run(&[args, &["--device", "cpu"]].concat());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success() && stderr.is_empty(), "{args:?}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs, which must fail with this exit code and with a message that contains `says`, and must leave no file.
    #[track_caller]
    fn fails(&self, code: i32, says: &[&str], args: &[&str]) {
        let before = self.names();
        let output = self.run(args);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        // Clap adds its usage; graphics drivers may print lines of their own before ours.
        let lines: Vec<_> = stderr.lines().collect();
        let ours = if code == 2 { lines.first() } else { lines.last() };
        assert!(ours.is_some_and(|line| line.starts_with("error: ")), "{args:?}: {stderr}");
        assert!(code == 2 || lines.len() == 1 || !args.contains(&"cpu"), "{args:?}: {stderr}");
        for text in says {
            assert!(stderr.contains(text), "{args:?}: {stderr:?} lacks {text:?}");
        }
        assert_eq!(self.names(), before, "{args:?} left files");
    }
}

struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

fn matrix(dtype: DType, rows: usize, cols: usize, seed: u64) -> Tensor {
    let values = gaussian(seed, rows * cols);
    let (kind, data) = match dtype {
        DType::F32 => (Dtype::F32, f32s(&values)),
        DType::F16 => (
            Dtype::F16,
            values.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect(),
        ),
        DType::BF16 => (
            Dtype::BF16,
            values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect(),
        ),
    };
    Tensor { dtype: kind, shape: vec![rows, cols], data }
}

/// A file by the safetensors crate, so that the program's own writer is not its oracle.
fn file(tensors: &[(&str, Tensor)], metadata: &[(&str, &str)]) -> Vec<u8> {
    let views = tensors
        .iter()
        .map(|(name, t)| (*name, TensorView::new(t.dtype, t.shape.clone(), &t.data).unwrap()));
    let metadata: HashMap<_, _> =
        metadata.iter().map(|(k, v)| ((*k).to_string(), (*v).to_string())).collect();
    safetensors::serialize(views, (!metadata.is_empty()).then_some(metadata)).unwrap()
}

/// A file with this header, whatever it says.
fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

const SHAPES: [(&str, DType, usize, usize); 6] = [
    ("a.ragged", DType::F32, 33, 70),
    ("b.half", DType::F16, 17, 96),
    ("c.brain", DType::BF16, 40, 31),
    ("d.empty", DType::F32, 0, 64),
    ("e.narrow", DType::F32, 5, 0),
    ("f.even", DType::F32, 64, 128),
];

fn sample() -> Vec<u8> {
    let mut tensors: Vec<_> = (1u64..)
        .zip(SHAPES)
        .map(|(seed, (name, dtype, rows, cols))| (name, matrix(dtype, rows, cols, seed)))
        .collect();
    for (name, dtype, shape) in [
        ("bias", Dtype::F32, vec![7]),
        ("conv", Dtype::F32, vec![2, 3, 4]),
        ("double", Dtype::F64, vec![2, 2]),
        ("index", Dtype::I64, vec![3, 2]),
        ("scalar", Dtype::BF16, vec![]),
        ("mask", Dtype::BOOL, vec![1, 3]),
    ] {
        let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        let data = (0..bytes).map(|i| (i * 37 % 2) as u8).collect();
        tensors.push((name, Tensor { dtype, shape, data }));
    }
    file(&tensors, &[("format", "pt"), ("note", "ünï \"quoted\"\n")])
}

/// Quantizes the sample and turns it back; everything must be what the library makes of it.
fn round_trip(spec: MxSpec, axis: Axis, args: &[&str], desc: impl Fn(u64) -> QuantizeDesc) {
    let dir = Dir::new("quantize");
    let original = sample();
    dir.write("in.safetensors", &original);
    let report = dir.ok(&[&["in.safetensors", "-o", "q.safetensors"], args].concat());
    assert!(report.starts_with("device: CPU"), "{report}");
    assert!(report.contains(&format!("{spec} along axis {axis}")), "{report}");
    assert!(report.contains("copied unchanged: 6 tensors"), "{report}");
    let report = dir.ok(&["--dequantize", "q.safetensors", "-o", "back.safetensors"]);
    assert!(report.contains("a.ragged"), "{report}");

    let (q, back) = (dir.read("q.safetensors"), dir.read("back.safetensors"));
    let original = SafeTensors::deserialize(&original).unwrap();
    let packed = TensorFile::parse(&q).unwrap();
    let q = SafeTensors::deserialize(&q).unwrap();
    let back_file = TensorFile::parse(&back).unwrap();
    let back = SafeTensors::deserialize(&back).unwrap();

    assert_eq!(packed.mx_names(), SHAPES.map(|(name, ..)| name));
    assert_eq!(packed.metadata["microscaling.version"], "1");
    assert_eq!(
        packed.metadata["microscaling.tensor.a.ragged"],
        format!("{} block={} axis={axis} rows=33 cols=70", spec.name(), spec.block)
    );
    for metadata in [&packed.metadata, &back_file.metadata] {
        assert_eq!(metadata["format"], "pt");
        assert_eq!(metadata["note"], "ünï \"quoted\"\n");
    }
    assert_eq!(back_file.metadata.len(), 2);

    let mut names = original.names();
    names.sort_unstable();
    let mut got = back.names();
    got.sort_unstable();
    assert_eq!(got, names);
    for (stream, name) in (0..).zip(names) {
        let before = original.tensor(name).unwrap();
        let Some((_, dtype, rows, cols)) = SHAPES.iter().find(|(n, ..)| *n == name) else {
            assert_eq!(q.tensor(name).unwrap(), before);
            assert_eq!(back.tensor(name).unwrap(), before);
            continue;
        };
        let x = to_f32(*dtype, before.data());
        let want = MxTensor::quantize(&x, *rows, *cols, &desc(stream)).unwrap();
        assert_eq!(packed.mx(name).unwrap(), want, "{name}");
        assert_bytes(name, q.tensor(&format!("{name}.codes")).unwrap().data(), want.codes());
        assert_bytes(name, q.tensor(&format!("{name}.scales")).unwrap().data(), want.scales());
        assert!(q.tensor(name).is_err());
        let after = back.tensor(name).unwrap();
        assert_eq!((after.dtype(), after.shape()), (Dtype::F32, before.shape()));
        assert_bytes(name, after.data(), &f32s(&want.dequantize()));
    }
}

fn nearest(spec: MxSpec, axis: Axis) -> impl Fn(u64) -> QuantizeDesc {
    move |_| QuantizeDesc { spec, axis, ..Default::default() }
}

#[test]
fn every_format_along_both_axes() {
    for (name, spec) in NAMED {
        for (text, axis) in [("0", Axis::Zero), ("1", Axis::One)] {
            let args = ["--format", name, "--axis", text];
            round_trip(spec, axis, &args, nearest(spec, axis));
        }
    }
}

#[test]
fn every_block() {
    for (format, text, block) in [
        ("mxfp6-e3m2", "16", Block::Vector(16)),
        ("nvfp4", "32", Block::Vector(32)),
        ("mxfp4", "64", Block::Vector(64)),
        ("mxint8", "128", Block::Vector(128)),
        ("nvfp4", "16x16", Block::Square(16)),
        ("mxfp4", "16x16", Block::Square(16)),
        ("mxfp6-e2m3", "32x32", Block::Square(32)),
    ] {
        let spec = MxSpec::by_name(format).unwrap().with_block(block);
        for (number, axis) in [("0", Axis::Zero), ("1", Axis::One)] {
            let args = ["--format", format, "--block", text, "--axis", number];
            round_trip(spec, axis, &args, nearest(spec, axis));
        }
    }
}

#[test]
fn every_scale_rule() {
    for (text, rule) in [
        ("floor", ScaleRule::Floor),
        ("ceil", ScaleRule::Ceil),
        ("rceil", ScaleRule::Rceil),
        ("even", ScaleRule::Even),
    ] {
        let desc = |_| QuantizeDesc { scale_rule: Some(rule), ..Default::default() };
        round_trip(MXFP4, Axis::One, &["--scale-rule", text], desc);
    }
}

#[test]
fn stochastic_rounding_draws_by_seed_and_place() {
    let desc = |seed, rule| {
        move |stream| QuantizeDesc {
            scale_rule: Some(rule),
            rounding: Rounding::Stochastic { seed, stream },
            ..Default::default()
        }
    };
    let stochastic = ["--rounding", "stochastic"];
    round_trip(MXFP4, Axis::One, &stochastic, desc(0, ScaleRule::Rceil));
    let args = [&stochastic[..], &["--seed", "18446744073709551615"]].concat();
    round_trip(MXFP4, Axis::One, &args, desc(u64::MAX, ScaleRule::Rceil));
    let args = [&stochastic[..], &["--scale-rule", "floor"]].concat();
    round_trip(MXFP4, Axis::One, &args, desc(0, ScaleRule::Floor));
}

#[test]
fn the_same_seed_gives_the_same_bytes() {
    let dir = Dir::new("quantize");
    dir.write("in.safetensors", &sample());
    let run = |seed: &str| {
        let args = ["in.safetensors", "-o", "out.safetensors", "--rounding", "stochastic"];
        dir.ok(&[&args[..], &["--seed", seed]].concat());
        dir.read("out.safetensors")
    };
    let first = run("1");
    assert_eq!(run("1"), first);
    assert_ne!(run("2"), first);
}

#[test]
fn output_may_be_input() {
    let dir = Dir::new("quantize");
    dir.write("w.safetensors", &sample());
    dir.ok(&["w.safetensors", "-o", "other.safetensors"]);
    dir.ok(&["w.safetensors", "-o", "w.safetensors"]);
    assert_eq!(dir.read("w.safetensors"), dir.read("other.safetensors"));
    assert_eq!(dir.names(), ["other.safetensors", "w.safetensors"]);
}

#[test]
fn a_quantized_file_stays_as_it_is() {
    // The parts are no 2-D floats.
    let dir = Dir::new("quantize");
    dir.write("in.safetensors", &sample());
    dir.ok(&["in.safetensors", "-o", "q.safetensors", "--format", "nvfp4"]);
    let output = dir.run(&["q.safetensors", "-o", "qq.safetensors", "--device", "cpu"]);
    assert!(output.status.success());
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("warning: nothing was quantized"), "{stderr}");
    assert_eq!(dir.read("q.safetensors"), dir.read("qq.safetensors"));
}

#[test]
fn nan_is_a_warning() {
    let dir = Dir::new("quantize");
    let mut weight = matrix(DType::F32, 2, 64, 1);
    weight.data[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    dir.write("in.safetensors", &file(&[("w", weight)], &[]));
    let output = dir.run(&["in.safetensors", "-o", "q.safetensors", "--device", "cpu"]);
    assert!(output.status.success());
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.starts_with("warning: tensor \"w\": 1 of its blocks"), "{stderr}");
    // The error is that of the other blocks.
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(stdout.contains("e-2") && !stdout.contains("NaN"), "{stdout}");
}

#[test]
fn without_a_file_it_reports() {
    let dir = Dir::new("quantize");
    let report = dir.ok(&[]);
    let line = report.lines().find(|line| line.starts_with("weight")).unwrap();
    let words: Vec<_> = line.split_whitespace().collect();
    assert_eq!(words[1], "4096x4096");
    let error: f64 = words[2].parse().unwrap();
    // What MXFP4 under OCP's scales loses of a gaussian; the weight is always the same.
    assert!((error - 0.0130).abs() < 0.0002, "{line}");
    assert!(report.lines().any(|line| line.starts_with("total")), "{report}");
    assert_eq!(dir.names(), [""; 0]);
    dir.ok(&["-o", "w.safetensors"]);
    let bytes = dir.read("w.safetensors");
    assert_eq!(TensorFile::parse(&bytes).unwrap().mx_names(), ["weight"]);
}

#[test]
fn wrong_arguments() {
    let dir = Dir::new("quantize");
    dir.write("in.safetensors", &sample());
    let with = |args: &[&'static str]| -> Vec<&'static str> {
        [&["in.safetensors", "-o", "out.safetensors", "--device", "cpu"], args].concat()
    };
    dir.fails(2, &["mxfp5", "mxfp4, mxfp6-e2m3"], &with(&["--format", "mxfp5"]));
    dir.fails(2, &["24", "16, 32, 64, 128, 16x16, 32x32"], &with(&["--block", "24"]));
    dir.fails(2, &["64x64"], &with(&["--block", "64x64"]));
    dir.fails(2, &["--axis"], &with(&["--axis", "2"]));
    dir.fails(2, &["--seed"], &with(&["--rounding", "stochastic", "--seed=-1"]));
    dir.fails(2, &["--format"], &with(&["--dequantize", "--format", "mxfp4"]));
    dir.fails(2, &["--output"], &["in.safetensors"]);
    dir.fails(2, &["IN.safetensors"], &["--dequantize", "-o", "out.safetensors"]);
    dir.fails(1, &["--rounding stochastic"], &with(&["--seed", "1"]));
    let rule = with(&["--format", "nvfp4", "--scale-rule", "floor"]);
    dir.fails(1, &["nvfp4", "Even", "Rceil"], &rule);
    let named = ["in.safetensors", "-o", "out.safetensors", "--device", "No Such Device"];
    dir.fails(1, &["No Such Device", "info"], &named);
}

#[test]
fn files_that_cannot_be_read_or_written() {
    let dir = Dir::new("quantize");
    dir.write("in.safetensors", &sample());
    std::fs::create_dir(dir.path("folder")).unwrap();
    let fails = |says: &[&str], input: &str, output: &str| {
        dir.fails(1, says, &[input, "-o", output, "--device", "cpu"]);
    };
    fails(&["cannot read none.safetensors"], "none.safetensors", "out.safetensors");
    fails(&["folder", "not a regular file"], "folder", "out.safetensors");
    let nowhere = Path::new("nowhere").join("out.safetensors");
    fails(&["cannot write", "choose a directory"], "in.safetensors", nowhere.to_str().unwrap());
    fails(&["cannot write folder", "not a regular file"], "in.safetensors", "folder");
    // It is said before anything is read.
    fails(&["cannot write"], "none.safetensors", nowhere.to_str().unwrap());
}

#[test]
fn files_that_are_no_safetensors() {
    let good = sample();
    let header = u64::from_le_bytes(*good.first_chunk().unwrap()) as usize;
    let entry = |name: &str, shape: &str, offsets: &str| {
        format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}"#)
    };
    let mut long = good.clone();
    long[..8].copy_from_slice(&(good.len() as u64).to_le_bytes());
    let mut huge = good.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let one = entry("a", "[1,4]", "[0,16]");
    let cases: &[(&str, Vec<u8>)] = &[
        ("is empty", Vec::new()),
        ("too few for a header", good[..7].to_vec()),
        ("the header claims", good[..8].to_vec()),
        ("the header claims", good[..header / 2].to_vec()),
        ("do not end where the file", good[..good.len() - 1].to_vec()),
        ("do not end where the file", good[..header + 8].to_vec()),
        ("do not end where the file", [&good[..], &[0]].concat()),
        ("the header claims", long),
        ("the header claims 18446744073709551615 bytes", huge),
        ("the header claims", b"# A text that is no tensor file at all\n".to_vec()),
        ("JSON", raw("{\"a\":", &[])),
        ("JSON", raw("[1, 2, 3]", &[])),
        ("UTF-8", [&4u64.to_le_bytes()[..], &[0xff; 4]].concat()),
        ("JSON", raw(&one, &[0; 16])),
        ("JSON", raw(&format!("{{{}}}", one.replace("F32", "F33")), &[0; 16])),
        (
            "\"b\" offsets that overlap",
            raw(&format!("{{{one},{}}}", entry("b", "[1,4]", "[8,24]")), &[0; 24]),
        ),
        (
            "offsets that overlap or leave a gap",
            raw(&format!("{{{one},{}}}", entry("b", "[1,4]", "[20,36]")), &[0; 36]),
        ),
        ("offsets that overlap", raw(&format!("{{{}}}", entry("a", "[1,4]", "[16,0]")), &[0; 16])),
        ("not its shape's size", raw(&format!("{{{}}}", entry("a", "[1,5]", "[0,16]")), &[0; 16])),
        ("do not end where", raw(&format!("{{{}}}", entry("a", "[1,400]", "[0,1600]")), &[0; 16])),
        (
            "overflow",
            raw(&format!("{{{}}}", entry("a", "[4611686018427387904,4]", "[0,16]")), &[0; 16]),
        ),
    ];
    for (says, bytes) in cases {
        let dir = Dir::new("quantize");
        dir.write("in.safetensors", bytes);
        for way in [&[][..], &["--dequantize"]] {
            let args = ["in.safetensors", "-o", "out.safetensors", "--device", "cpu"];
            dir.fails(1, &["in.safetensors", says], &[&args[..], way].concat());
        }
        assert_eq!(dir.read("in.safetensors"), *bytes);
    }
}

#[test]
fn quantizing_onto_a_name_that_is_taken() {
    let dir = Dir::new("quantize");
    let taken = Tensor { dtype: Dtype::U8, shape: vec![1], data: vec![0] };
    let weight = matrix(DType::F32, 2, 32, 1);
    dir.write("in.safetensors", &file(&[("w", weight), ("w.scales", taken)], &[]));
    dir.fails(
        1,
        &["in.safetensors", "\"w\"", "\"w.scales\"", "rename"],
        &["in.safetensors", "-o", "out.safetensors", "--device", "cpu"],
    );
}

#[test]
fn dequantizing_what_is_not_or_wrongly_quantized() {
    let u8s = |shape: [usize; 2]| Tensor {
        dtype: Dtype::U8,
        shape: shape.to_vec(),
        data: vec![0x22; shape[0] * shape[1]],
    };
    let scale = |value: f32| Tensor { dtype: Dtype::F32, shape: vec![1], data: f32s(&[value]) };
    let key = "microscaling.tensor.w";
    let says = |spec: &'static str| vec![("microscaling.version", "1"), (key, spec)];
    let mxfp4 = "mxfp4 block=1x32 axis=1 rows=3 cols=40";
    let nvfp4 = "nvfp4 block=1x16 axis=1 rows=3 cols=40";
    let good = || vec![("w.codes", u8s([3, 32])), ("w.scales", u8s([3, 2]))];
    let nv = |s| vec![("w.codes", u8s([3, 24])), ("w.scales", u8s([3, 3])), ("w.tensor_scale", s)];
    type Case<'a> = (&'a [&'a str], Vec<(&'static str, Tensor)>, Vec<(&'static str, &'static str)>);
    let cases: Vec<Case<'_>> = vec![
        (&["names no quantized tensor", "--dequantize"], good(), vec![("format", "pt")]),
        (&["microscaling.version"], good(), vec![(key, mxfp4)]),
        (
            &["microscaling.version", "\"2\""],
            good(),
            vec![("microscaling.version", "2"), (key, mxfp4)],
        ),
        (&["\"w.scales\" is missing"], vec![("w.codes", u8s([3, 32]))], says(mxfp4)),
        (&["\"w.codes\" is missing"], vec![("w.scales", u8s([3, 2]))], says(mxfp4)),
        (
            &["\"w.codes\" is U8 [3, 31]", "U8 [3, 32]"],
            vec![("w.codes", u8s([3, 31])), ("w.scales", u8s([3, 2]))],
            says(mxfp4),
        ),
        (
            &["\"w.scales\" is U8 [3, 1]", "U8 [3, 2]"],
            vec![("w.codes", u8s([3, 32])), ("w.scales", u8s([3, 1]))],
            says(mxfp4),
        ),
        (
            &["\"w.codes\" is F32 [3, 32]"],
            vec![("w.codes", matrix(DType::F32, 3, 32, 1)), ("w.scales", u8s([3, 2]))],
            says(mxfp4),
        ),
        (&["\"w.codes\"", "rows=4"], good(), says("mxfp4 block=1x32 axis=1 rows=4 cols=40")),
        (&["\"w.codes\"", "axis=0"], good(), says("mxfp4 block=1x32 axis=0 rows=3 cols=40")),
        (&["\"w.codes\""], good(), says("mxfp8-e4m3 block=1x32 axis=1 rows=3 cols=40")),
        (&["unknown format", "mxfp7"], good(), says("mxfp7 block=1x32 axis=1 rows=3 cols=40")),
        (&["block"], good(), says("mxfp4 block=1x33 axis=1 rows=3 cols=40")),
        (&["not a size"], good(), says("mxfp4 block=1x32 axis=1 rows=3 cols=99999999999999999999")),
        (&["FORMAT block=LxN axis=A rows=R cols=C"], good(), says("mxfp4")),
        (
            &["\"w.tensor_scale\" is missing"],
            nv(scale(1.0)).into_iter().take(2).collect(),
            says(nvfp4),
        ),
        (&["positive normal"], nv(scale(0.0)), says(nvfp4)),
        (&["positive normal"], nv(scale(f32::NAN)), says(nvfp4)),
        (
            &["\"w\"", "twice"],
            good().into_iter().chain([("w", u8s([1, 1]))]).collect(),
            says(mxfp4),
        ),
    ];
    for (what, tensors, metadata) in cases {
        let dir = Dir::new("quantize");
        dir.write("in.safetensors", &file(&tensors, &metadata));
        let args = ["--dequantize", "in.safetensors", "-o", "out.safetensors", "--device", "cpu"];
        dir.fails(1, &[&["in.safetensors"], what].concat(), &args);
    }
    // The control: the same parts under true metadata are read.
    for (tensors, spec) in [(good(), mxfp4), (nv(scale(1.0)), nvfp4)] {
        let dir = Dir::new("quantize");
        dir.write("in.safetensors", &file(&tensors, &says(spec)));
        dir.ok(&["--dequantize", "in.safetensors", "-o", "out.safetensors"]);
    }
}
