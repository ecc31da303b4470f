//! The program `examples/matmul.rs` as its users run it: files in, a file out, messages and exit codes. The exact tier's
//! bytes on every engine against the oracle of tests/common/product.rs, the others within its bounds.
#![cfg(feature = "safetensors")]

mod common;

use common::cli::Dir;
use common::product::{Lines, compare, product};
use common::{assert_bytes, gaussian};
use microscaling::formats::NAMED;
use microscaling::interop::safetensors::TensorFile;
use microscaling::{DType, MXFP4, MxSpec, MxTensor, NVFP4, QuantizeDesc, Tier, engine};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

impl Dir {
    /// Runs, which must succeed; returns what it printed.
    #[track_caller]
    fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs on the CPU engine, which must fail with this exit code and one line that contains `says`, and leave no file.
    #[track_caller]
    fn fails(&self, code: i32, says: &[&str], args: &[&str]) {
        let before = self.names();
        let output = self.run(&[args, &["--device", "cpu"]].concat());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        assert!(stderr.starts_with("error: "), "{args:?}: {stderr}");
        assert!(code == 2 || stderr.lines().count() == 1, "{args:?}: {stderr}");
        for text in says {
            assert!(stderr.contains(text), "{args:?}: {stderr:?} lacks {text:?}");
        }
        assert_eq!(self.names(), before, "{args:?} left files");
    }
}

fn bytes(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|x| match dtype {
            Dtype::F64 => f64::from(*x).to_le_bytes().to_vec(),
            Dtype::F32 => x.to_le_bytes().to_vec(),
            Dtype::F16 => half::f16::from_f32(*x).to_le_bytes().to_vec(),
            Dtype::BF16 => half::bf16::from_f32(*x).to_le_bytes().to_vec(),
            _ => vec![*x as i8 as u8],
        })
        .collect()
}

/// A file by the safetensors crate, so that the program's own reader is not its oracle.
fn file(name: &str, dtype: Dtype, shape: &[usize], values: &[f32]) -> Vec<u8> {
    let data = bytes(dtype, values);
    let view = TensorView::new(dtype, shape.to_vec(), &data).unwrap();
    safetensors::serialize([(name, view)], None).unwrap()
}

/// Odd in every direction.
const M: usize = 37;
const N: usize = 53;
const K: usize = 200;

fn values() -> [Vec<f32>; 2] {
    [gaussian(1, M * K), gaussian(2, N * K)]
}

/// A directory with A and B in f32.
fn operands() -> Dir {
    let dir = Dir::new("matmul");
    let [a, b] = values();
    dir.write("a.safetensors", &file("x", Dtype::F32, &[M, K], &a));
    dir.write("b.safetensors", &file("x", Dtype::F32, &[N, K], &b));
    dir
}

const FILES: [&str; 4] = ["a.safetensors", "b.safetensors", "-o", "c.safetensors"];

fn lines(spec: MxSpec, values: &[f32], rows: usize) -> Lines {
    let desc = QuantizeDesc { spec, ..Default::default() };
    Lines::mx(&MxTensor::quantize(values, rows, K, &desc).unwrap(), false)
}

/// The CPU engine, and a part of the name of every adapter.
fn devices() -> Vec<String> {
    let mut names = vec!["cpu".to_string()];
    if std::env::var("MX_TEST_GPU").as_deref() != Ok("off") {
        let adapters = pollster::block_on(engine::adapters(false));
        names.extend(adapters.iter().map(|adapter| adapter.get_info().name));
    }
    names
}

/// The data of `y`, of a type and shape.
#[track_caller]
fn y(dir: &Dir, dtype: Dtype) -> Vec<u8> {
    let bytes = dir.read("c.safetensors");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.names(), ["y"]);
    let y = file.tensor("y").unwrap();
    assert_eq!((y.dtype(), y.shape()), (dtype, &[M, N][..]));
    y.data().to_vec()
}

#[test]
fn a_closed_pipe_is_quiet() {
    operands().unread(&[&FILES[..], &["--device", "cpu"]].concat());
}

#[test]
fn the_exact_tier_has_the_same_bytes_on_every_engine() {
    let dir = operands();
    let [a, b] = values();
    for device in devices() {
        for (name_a, name_b) in
            [("mxfp4", "mxfp4"), ("nvfp4", "mxfp4"), ("mxfp6-e2m3", "mxint8"), ("nvfp4", "nvfp4")]
        {
            let specs = [name_a, name_b].map(|name| MxSpec::by_name(name).unwrap());
            let want = product(Tier::Exact, &lines(specs[0], &a, M), &lines(specs[1], &b, N), 1.0);
            for (out, dtype, kind) in [
                ("f32", DType::F32, Dtype::F32),
                ("f16", DType::F16, Dtype::F16),
                ("bf16", DType::BF16, Dtype::BF16),
            ] {
                if out != "f32" && name_a != "mxfp4" {
                    continue;
                }
                let formats = ["--a-format", name_a, "--b-format", name_b, "--out", out];
                let how = ["--tier", "exact", "--device", &device];
                let printed = dir.ok(&[&FILES[..], &formats, &how].concat());
                assert!(printed.contains("tier: exact (asked for)"), "{printed}");
                compare(dtype, true, &y(&dir, kind), &want, N)
                    .unwrap_or_else(|error| panic!("{device} {name_a} {name_b} {out}: {error}"));
            }
        }
    }
}

#[test]
fn packed_outputs_are_the_product_quantized() {
    let dir = operands();
    let [a, b] = values();
    let want = product(Tier::Exact, &lines(MXFP4, &a, M), &lines(MXFP4, &b, N), 1.0);
    let want: Vec<f32> = want.iter().map(|ends| ends[0]).collect();
    for device in devices() {
        for (name, spec) in NAMED {
            if device != "cpu" && spec != MXFP4 && spec != NVFP4 {
                continue;
            }
            let how = ["--tier", "exact", "--out", name, "--device", &device];
            dir.ok(&[&FILES[..], &how].concat());
            let bytes = dir.read("c.safetensors");
            let got = TensorFile::parse(&bytes).unwrap().mx("y").unwrap();
            let desc = QuantizeDesc { spec, ..Default::default() };
            assert_eq!(got, MxTensor::quantize(&want, M, N, &desc).unwrap(), "{device} {name}");
        }
    }
}

#[test]
fn every_type_in_the_files_and_dense_operands() {
    let dir = Dir::new("matmul");
    let [a, b] = values();
    for (dtype, name) in
        [(Dtype::F64, "f32"), (Dtype::F32, "f32"), (Dtype::F16, "f16"), (Dtype::BF16, "bf16")]
    {
        dir.write("a.safetensors", &file("x", dtype, &[M, K], &a));
        dir.write("b.safetensors", &file("x", dtype, &[N, K], &b));
        let rounded = |values: &[f32]| -> Vec<f32> {
            match dtype {
                Dtype::F16 => values.iter().map(|x| half::f16::from_f32(*x).to_f32()).collect(),
                Dtype::BF16 => values.iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect(),
                _ => values.to_vec(),
            }
        };
        let (a, b) = (rounded(&a), rounded(&b));
        // Dense on both sides, in the file's type, and as f32, which holds all of them.
        let dense = |values: &[f32], rows| Lines::dense(values, [rows, K], false);
        let want = product(Tier::Alu, &dense(&a, M), &dense(&b, N), 1.0);
        for format in [name, "f32"] {
            let formats = ["--a-format", format, "--b-format", format, "--device", "cpu"];
            dir.ok(&[&FILES[..], &formats].concat());
            compare(DType::F32, false, &y(&dir, Dtype::F32), &want, N)
                .unwrap_or_else(|error| panic!("{dtype} as {format}: {error}"));
        }
        // Quantized from the file's type.
        dir.ok(&[&FILES[..], &["--device", "cpu"]].concat());
        let want = product(Tier::Exact, &lines(MXFP4, &a, M), &lines(MXFP4, &b, N), 1.0);
        compare(DType::F32, true, &y(&dir, Dtype::F32), &want, N)
            .unwrap_or_else(|error| panic!("{dtype}: {error}"));
    }
}

#[test]
fn the_alu_tier_is_within_its_bounds_and_auto_says_why() {
    let dir = operands();
    let [a, b] = values();
    let spec = MxSpec::by_name("mxfp8-e4m3").unwrap();
    let want = product(Tier::Alu, &lines(spec, &a, M), &lines(MXFP4, &b, N), 1.0);
    for device in devices() {
        let args = ["--a-format", "mxfp8-e4m3", "--tier", "alu", "--device", &device];
        dir.ok(&[&FILES[..], &args].concat());
        compare(DType::F32, false, &y(&dir, Dtype::F32), &want, N)
            .unwrap_or_else(|error| panic!("{device}: {error}"));
    }
    let printed = dir.ok(&[&FILES[..], &["--a-format", "mxfp8-e4m3", "--device", "cpu"]].concat());
    assert!(printed.contains("tier: alu (") && printed.contains("A is mxfp8-e4m3"), "{printed}");
}

#[test]
fn output_may_be_an_input_and_the_same_run_gives_the_same_bytes() {
    let dir = operands();
    dir.ok(&[&FILES[..], &["--device", "cpu"]].concat());
    let first = dir.read("c.safetensors");
    dir.ok(&["a.safetensors", "b.safetensors", "-o", "a.safetensors", "--device", "cpu"]);
    assert_bytes("over A", &dir.read("a.safetensors"), &first);
    assert_eq!(dir.names(), ["a.safetensors", "b.safetensors", "c.safetensors"]);
}

#[test]
fn nothing_to_contract_and_nothing_to_multiply() {
    let dir = Dir::new("matmul");
    for [m, n, k] in [[3, 5, 0], [0, 5, 64], [3, 0, 64]] {
        dir.write("a.safetensors", &file("x", Dtype::F32, &[m, k], &gaussian(1, m * k)));
        dir.write("b.safetensors", &file("x", Dtype::F32, &[n, k], &gaussian(2, n * k)));
        for device in devices() {
            dir.ok(&[&FILES[..], &["--device", &device]].concat());
            let bytes = dir.read("c.safetensors");
            let file = SafeTensors::deserialize(&bytes).unwrap();
            let y = file.tensor("y").unwrap();
            assert_eq!(y.shape(), [m, n]);
            assert_bytes(&device, y.data(), &vec![0; m * n * 4]);
        }
    }
}

#[test]
fn nan_is_a_warning() {
    let dir = operands();
    let [mut a, _] = values();
    a[5 * K + 7] = f32::NAN;
    dir.write("a.safetensors", &file("x", Dtype::F32, &[M, K], &a));
    let output = dir.run(&[&FILES[..], &["--device", "cpu"]].concat());
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && stderr.starts_with("warning: "), "{stderr}");
    let y = common::to_f32(DType::F32, &y(&dir, Dtype::F32));
    let lines: Vec<bool> = y.chunks(N).map(|row| row.iter().all(|v| v.is_nan())).collect();
    assert!(lines.iter().enumerate().all(|(i, nan)| *nan == (i == 5)), "{lines:?}");
}

#[test]
fn without_files_it_multiplies_its_own() {
    let dir = Dir::new("matmul");
    let printed = dir.ok(&["--device", "cpu"]);
    for text in ["device: CPU", "[1024, 1024]", "tier: exact", "time: ", "FLOP/s", "error: "] {
        assert!(printed.contains(text), "{printed:?} lacks {text:?}");
    }
    assert!(dir.names().is_empty());
    dir.ok(&["--device", "cpu", "-o", "c.safetensors", "--out", "nvfp4"]);
    let bytes = dir.read("c.safetensors");
    let y = TensorFile::parse(&bytes).unwrap().mx("y").unwrap();
    assert_eq!((y.layout().rows, y.layout().cols), (1024, 1024));
}

#[test]
fn wrong_arguments_and_files() {
    let dir = operands();
    dir.fails(2, &["-o"], &["a.safetensors", "b.safetensors"]);
    dir.fails(2, &["B.safetensors"], &["a.safetensors", "-o", "c.safetensors"]);
    let with = |more: &[&'static str]| [&FILES[..], more].concat();
    dir.fails(2, &["mxfp5", "mxfp6-e2m3", "bf16"], &with(&["--a-format", "mxfp5"]));
    dir.fails(2, &["fast", "exact"], &with(&["--tier", "fast"]));
    // Asked for by name: no other tier instead.
    dir.fails(
        1,
        &["the exact tier needs", "A is f16"],
        &with(&["--tier", "exact", "--a-format", "f16"]),
    );
    dir.fails(1, &["the tensor tier needs", "the CPU engine"], &with(&["--tier", "tensor"]));
    dir.fails(
        1,
        &["cannot read no.safetensors"],
        &["no.safetensors", "b.safetensors", "-o", "c.safetensors"],
    );
    dir.fails(
        1,
        &["cannot write no/c.safetensors"],
        &["a.safetensors", "b.safetensors", "-o", "no/c.safetensors"],
    );
    for (bytes, says) in [
        (
            file("x", Dtype::F32, &[N, 64], &gaussian(2, N * 64)),
            "x is [37, 200], but b.safetensors: x is [53, 64]",
        ),
        (
            file("weight", Dtype::F32, &[N, K], &gaussian(2, N * K)),
            "no tensor \"x\", which is what is multiplied; it has \"weight\"",
        ),
        (
            file("x", Dtype::F32, &[N * K], &gaussian(2, N * K)),
            "x has shape [10600]; a matrix is needed",
        ),
        (file("x", Dtype::I8, &[N, K], &gaussian(2, N * K)), "x is I8; F64, F32, F16 or BF16"),
        (vec![], "the file is empty"),
        (b"not a file of tensors".to_vec(), "no .safetensors file"),
    ] {
        dir.write("b.safetensors", &bytes);
        dir.fails(1, &["b.safetensors", says], &FILES);
    }
    #[cfg(unix)]
    {
        std::fs::create_dir(dir.path("d")).unwrap();
        let args = ["a.safetensors", "b.safetensors", "-o", "d"];
        dir.fails(1, &["cannot write d: it exists and is not a regular file"], &args);
    }
}
