//! The SPIR-V that this crate makes itself (src/engine/spirv.rs), of the tensor tier's fragments of bytes and of E2M1 operands that
//! the device converts: what its words say, and, where `MX_NATIVE_TOOLS` names a Python environment
//! into which tests/codegen/requirements.txt was installed, what Khronos' validator says to it and to the fragments of f16 and
//! bf16. No device runs it; what decodes E2M1 is computed here, word by word, by the definitions of its instructions.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use libtest_mimic::{Arguments, Failed, Trial};
use microscaling::engine::shader::Kernel;
use microscaling::engine::spirv;
use microscaling::kernels;

fn main() {
    let args = Arguments::from_args();
    let tools = std::env::var_os("MX_NATIVE_TOOLS").map(PathBuf::from);
    let mut trials = vec![
        Trial::test("fragments_of_bytes_are_declared", || declared(&words)),
        Trial::test("e2m1_conversions_are_declared", || conversions(&words)),
        Trial::test("a_wrong_word_shows", wrong_words),
        Trial::test("e2m1_conversions_give_the_decoders_bits", same_bits),
    ];
    trials.push(match tools {
        None => Trial::test("[no tools] spirv_val", || Ok(())).with_ignored_flag(true),
        Some(dir) => Trial::test("spirv_val", move || validated(&dir)),
    });
    libtest_mimic::run(&args, trials).exit();
}

/// Whether a kernel is in bytes, and then whether in integers.
fn integers(kernel: &Kernel) -> Option<bool> {
    let e4m3 = kernel.name.contains(".e4m3k");
    let i8 = kernel.name.contains(".i8k");
    (e4m3 || i8).then_some(i8)
}

/// The kernels in bytes that are not emulated.
fn in_bytes() -> Vec<Kernel> {
    let list: Vec<_> = kernels::matmul::kernels()
        .into_iter()
        .filter(|kernel| kernel.spirv && integers(kernel).is_some())
        .collect();
    for i8 in [false, true] {
        let count = list.iter().filter(|kernel| integers(kernel) == Some(i8)).count();
        assert!(count > 20, "{count} kernels");
    }
    list
}

/// Those whose E2M1 operands the device converts.
fn converting() -> Vec<Kernel> {
    let list: Vec<_> = kernels::matmul::kernels()
        .into_iter()
        .filter(|kernel| kernel.spirv && kernel.name.contains(".ocp16."))
        .collect();
    assert!(list.len() > 20, "{} kernels", list.len());
    list
}

fn words(kernel: &Kernel) -> Result<Vec<u32>, Failed> {
    Ok(spirv::compile(&kernel.wgsl)?)
}

/// Opcodes and operands.
fn instructions(words: &[u32]) -> Vec<(u16, &[u32])> {
    let mut rest = &words[5..];
    let mut list = Vec::new();
    while let Some(first) = rest.first() {
        let (instruction, after) = rest.split_at((first >> 16) as usize);
        list.push((*first as u16, &instruction[1..]));
        rest = after;
    }
    list
}

// Numbers of the SPIR-V registry, written here anew: SPV_EXT_float8, SPV_KHR_cooperative_matrix, SPIR-V 1.6.
fn declared(words: &dyn Fn(&Kernel) -> Result<Vec<u32>, Failed>) -> Result<(), Failed> {
    for kernel in in_bytes() {
        let k = if kernel.name.contains("k32-") { 32 } else { 16 };
        let i8 = integers(&kernel) == Some(true);
        let words = words(&kernel)?;
        let list = instructions(&words);
        let check = |what: &str, holds: bool| match holds {
            true => Ok(()),
            false => Err(Failed::from(format!("{}: {what}", kernel.name))),
        };
        let has = |op: u16, operands: &[u32]| list.iter().any(|(o, a)| *o == op && *a == operands);
        check("OpCapability Float8EXT", has(17, &[4212]) != i8)?;
        check("OpCapability Float8CooperativeMatrixEXT", has(17, &[4213]) != i8)?;
        check("OpCapability Int8", has(17, &[39]) == i8)?;
        check("OpCapability CooperativeMatrixKHR", has(17, &[6022]))?;
        check("OpCapability Float16", !has(17, &[9]))?;
        let text = |a: &[u32]| a.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
        let extension = |name: &[u8]| list.iter().any(|(op, a)| *op == 10 && text(a) == name);
        check("OpExtension SPV_EXT_float8", extension(b"SPV_EXT_float8\0\0") != i8)?;

        // OpTypeInt and OpTypeFloat, each with its operands.
        let scalars: HashMap<u32, (u16, &[u32])> = list
            .iter()
            .filter(|(op, _)| [21, 22].contains(op))
            .map(|(op, a)| (a[0], (*op, &a[1..])))
            .collect();
        let constants: HashMap<u32, u32> =
            list.iter().filter(|(op, _)| *op == 43).map(|(_, a)| (a[1], a[2])).collect();
        // Component type, scope, rows, columns, use; and by id.
        let mut matrices = Vec::new();
        let mut uses = HashMap::new();
        for (_, a) in list.iter().filter(|(op, _)| *op == 4456) {
            let [scope, rows, columns, used] = [2, 3, 4, 5].map(|at| constants[&a[at]]);
            matrices.push((scalars[&a[1]], scope, [rows, columns], used));
            uses.insert(a[0], used);
        }
        matrices.sort_by_key(|(.., used)| *used);
        let byte: (u16, &[u32]) = if i8 { (21, &[8, 1]) } else { (22, &[8, 4214]) };
        let mut want = vec![(byte, 3, [16, k], 0), (byte, 3, [k, 16], 1)];
        // Sums of integers, and what they become.
        let sums: [(u16, &[u32]); 2] = [(21, &[32, 1]), (22, &[32])];
        want.extend(sums[usize::from(!i8)..].iter().map(|sum| (*sum, 3, [16, 16], 2)));
        check(&format!("matrices are {matrices:?}"), matrices == want)?;

        // A is loaded row by row (layout 0), B column by column (1), whole 16 bytes apart.
        let types: HashMap<u32, u32> = list
            .iter()
            .filter(|(op, a)| a.len() >= 2 && [61, 111, 4457, 4459, 143].contains(op))
            .map(|(_, a)| (a[1], a[0]))
            .collect();
        // Branches that are never taken have the other layout.
        for used in [0, 1] {
            let load = |(op, a): &&(u16, &[u32])| *op == 4457 && uses[&a[0]] == used;
            let loads = list.iter().filter(load).map(|(_, a)| [3, 4].map(|at| constants[&a[at]]));
            // Units of four words: 80 bytes.
            let right = loads.filter(|load| *load == [used, 5]).count();
            check(&format!("no loads of use {used}"), right > 0)?;
        }
        let products = list.iter().filter(|(op, _)| *op == 4459).count();
        check("no products", products > 0)?;
        for (_, a) in list.iter().filter(|(op, _)| *op == 4459) {
            let used = [2, 3].map(|at| types.get(&a[at]).map(|ty| uses[ty]));
            check(&format!("a product of {used:?}"), used == [Some(0), Some(1)])?;
            // All of its components are signed.
            let flags = a.get(5).copied().unwrap_or(0);
            check(&format!("operands of a product: {flags}"), flags == if i8 { 15 } else { 0 })?;
        }
        let factored = list.iter().filter(|(op, _)| *op == 143).map(|(_, a)| (a[0], a[2]));
        let factored: Vec<_> = factored.collect();
        check("sums leave without their factor", !factored.is_empty())?;
        for (ty, sum) in factored {
            let converted = list.iter().any(|(op, a)| *op == 111 && a[..2] == [ty, sum]);
            check("a factor of integers", converted == i8)?;
        }
    }
    Ok(())
}

// Numbers of the SPIR-V registry again: SPV_EXT_ocp_microscaling_types, SPIR-V 1.6. What is checked are the rules of both, and of
// Vulkan (VUID-StandaloneSpirv-OpBitcastExtractEXT-12468 and 12469, -OpFConvert-12467), for codes of E2M1.
fn conversions(words: &dyn Fn(&Kernel) -> Result<Vec<u32>, Failed>) -> Result<(), Failed> {
    for kernel in converting() {
        let words = words(&kernel)?;
        let list = instructions(&words);
        let check = |what: &str, holds: bool| match holds {
            true => Ok(()),
            false => Err(Failed::from(format!("{}: {what}", kernel.name))),
        };
        let all = |op: u16| list.iter().filter(move |(o, _)| *o == op).map(|(_, a)| *a);
        let capability = |number: u32| all(17).any(|a| a == [number]);
        check("OpCapability Float4EXT", capability(4229))?;
        check("OpCapability BitcastExtractEXT", capability(4232))?;
        check("OpCapability Float16", capability(9))?;
        let text = |a: &[u32]| a.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
        let name = b"SPV_EXT_ocp_microscaling_types\0\0";
        check("OpExtension SPV_EXT_ocp_microscaling_types", all(10).any(|a| text(a) == name))?;

        let one = |what: &str, ids: Vec<u32>| match ids[..] {
            [id] => Ok(id),
            _ => Err(Failed::from(format!("{}: {} times {what}", kernel.name, ids.len()))),
        };
        let types = |op: u16, operands: &[u32]| {
            let like = all(op).filter(|a| a[1..] == *operands).map(|a| a[0]);
            like.collect::<Vec<_>>()
        };
        // Float4E2M1EXT, and two of it.
        let code = one("OpTypeFloat of E2M1", types(22, &[4, 4225]))?;
        let pair = one("OpTypeVector of E2M1", types(23, &[code, 2]))?;
        let word = one("OpTypeInt of a word", types(21, &[32, 0]))?;
        let two_words = one("OpTypeVector of words", types(23, &[word, 2]))?;
        let half = one("OpTypeFloat of f16", types(22, &[16]))?;
        let two_halves = one("OpTypeVector of f16", types(23, &[half, 2]))?;
        // Both are declared before the functions, and nothing else is made of them: no pointer, so no memory.
        let functions = list.iter().position(|(op, _)| *op == 54).ok_or("no function")?;
        for (op, a) in &list[..functions] {
            let declares = matches!(a, [id, ..] if [code, pair].contains(id));
            let uses = (19..=39).contains(op) && a[1..].iter().any(|id| [code, pair].contains(id));
            check(
                "a type made of E2M1",
                !uses || (*op, declares) == (23, true) || [21, 22].contains(op),
            )?;
        }
        let body = &list[functions..];
        let typed: HashMap<u32, u32> =
            body.iter().filter(|(_, a)| a.len() >= 2).map(|(_, a)| (a[1], a[0])).collect();
        let constants: HashMap<u32, &[u32]> =
            list.iter().filter(|(op, _)| [43, 44].contains(op)).map(|(_, a)| (a[1], *a)).collect();
        let type_of = |id: &u32| typed.get(id).copied().or(constants.get(id).map(|a| a[0]));
        let codes: HashSet<u32> = all(4195).map(|a| a[1]).collect();
        check("no OpBitcastExtractEXT", !codes.is_empty())?;
        for a in all(4195) {
            check("its result is a pair of codes", a[0] == pair)?;
            check("its base is two words", type_of(&a[2]) == Some(two_words))?;
            check("its offset is a word", a.len() == 4 && type_of(&a[3]) == Some(word))?;
        }
        let mut values = HashSet::new();
        for (op, a) in body {
            if a.len() >= 2 && a[0] == pair {
                check("codes that nothing extracts", codes.contains(&a[1]))?;
            }
            if a.len() > 2 && a[2..].iter().any(|id| codes.contains(id)) {
                check("codes become f16 and nothing else", *op == 115 && a[0] == two_halves)?;
                values.insert(a[1]);
            }
        }
        check("codes that are not converted", values.len() == codes.len())?;
        let integers = all(112).any(|a| a[0] == two_halves);
        check("integers become f16", !integers)?;
        check("fields that are integers become f16", !all(203).any(|a| a[0] == two_words))?;
        // The values are multiplied first by 2^-14, apart from what follows.
        let unit = |id: &u32| {
            let parts = constants.get(id).map_or(&[][..], |a| &a[2..]);
            parts.len() == 2
                && parts.iter().all(|p| constants.get(p).is_some_and(|a| a[2] == 0x0400))
        };
        let decorated: HashSet<u32> = all(71).filter(|a| a[1..] == [42]).map(|a| a[0]).collect();
        let mut products = 0;
        for a in all(133).filter(|a| a[2..].iter().any(unit)) {
            check("a product is not NoContraction", decorated.contains(&a[1]))?;
            products += 1;
        }
        check(&format!("{products} products"), products == codes.len())?;
    }
    Ok(())
}

/// Of an instruction's operands.
type Change = fn(u16, &mut [u32]);

fn changed(mut words: Vec<u32>, change: Change) -> Vec<u32> {
    let mut at = 5;
    while at < words.len() {
        let (length, op) = ((words[at] >> 16) as usize, words[at] as u16);
        change(op, &mut words[at + 1..at + length]);
        at += length;
    }
    words
}

/// The checks see each of these.
fn wrong_words() -> Result<(), Failed> {
    type Check = fn(&dyn Fn(&Kernel) -> Result<Vec<u32>, Failed>) -> Result<(), Failed>;
    let fragments: Check = declared;
    let changes: [(&str, Check, Change); 12] = [
        ("E5M2", fragments, |op, a| {
            if op == 22 && a[1..] == [8, 4214] {
                a[2] = 4215;
            }
        }),
        ("unsigned", fragments, |op, a| {
            if op == 4459 && a.len() == 6 {
                a[5] = 0;
            }
        }),
        ("integers not converted", fragments, |op, a| {
            if op == 111 {
                a[1] = a[2];
            }
        }),
        ("no capability", fragments, |op, a| {
            if op == 17 && a == [4213] {
                a[0] = 4212;
            }
        }),
        ("rows and columns swapped", fragments, |op, a| {
            if op == 4456 {
                a.swap(3, 4);
            }
        }),
        ("the other layout", fragments, |op, a| {
            if op == 4457 {
                a[3] = a[4];
            }
        }),
        ("E2M3", conversions, |op, a| {
            if op == 22 && a[1..] == [4, 4225] {
                a[2] = 4223;
            }
        }),
        ("no conversion's capability", conversions, |op, a| {
            if op == 17 && a == [4232] {
                a[0] = 4229;
            }
        }),
        ("another extension", conversions, |op, a| {
            if op == 10 && a.len() == 8 {
                a[7] = 0;
            }
        }),
        ("offset and base swapped", conversions, |op, a| {
            if op == 4195 {
                a.swap(2, 3);
            }
        }),
        ("codes that become something else", conversions, |op, a| {
            if op == 4195 {
                a[0] += 1;
            }
        }),
        ("contraction", conversions, |op, a| {
            if op == 71 && a[1..] == [42] {
                a[1] = 0;
            }
        }),
    ];
    for (what, check, change) in changes {
        if check(&|kernel| Ok(changed(words(kernel)?, change))).is_ok() {
            return Err(format!("{what} passes").into());
        }
    }
    Ok(())
}

/// naga says strides and offsets of types that are in no buffer too, which the validator (VUID-StandaloneSpirv-None-10684)
/// objects to for every module of naga's: left out here, so that it gets to see the rest.
fn mended(words: &[u32]) -> Vec<u32> {
    let list = instructions(words);
    let decorated = |decoration| {
        let of = move |(op, a): &&(u16, &[u32])| *op == 71 && a[1] == decoration;
        list.iter().filter(of).map(|(_, a)| a[0])
    };
    const BLOCK: u32 = 2;
    let mut keep: HashSet<u32> = decorated(BLOCK).collect();
    let structs = list.iter().filter(|(op, _)| *op == 30);
    keep.extend(
        structs
            .filter(|(_, a)| keep.contains(&a[0]))
            .flat_map(|(_, a)| a[1..].to_vec())
            .collect::<Vec<_>>(),
    );
    let mut out = words[..5].to_vec();
    // Atomics of buffers are the device's, whose capability (VulkanMemoryModelDeviceScope) naga leaves out, in every module of
    // Vulkan's memory model, as those with cooperative matrices are: declared here.
    out.extend([2 << 16 | 17, 5346]);
    for (op, a) in &list {
        let layout = matches!((*op, *a), (71, [_, 6, ..]) | (72, [_, _, 35, ..]));
        if !layout || keep.contains(&a[0]) {
            out.push((a.len() as u32 + 1) << 16 | u32::from(*op));
            out.extend(*a);
        }
    }
    out
}

fn validated(tools: &Path) -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let mut list: Vec<_> = in_bytes().into_iter().step_by(3).collect();
    list.extend(converting().into_iter().step_by(3));
    // Some of the others.
    let others = kernels::matmul::kernels().into_iter().filter(|kernel| kernel.spirv);
    let other = |kernel: &Kernel| integers(kernel).is_none() && !kernel.name.contains(".ocp16");
    list.extend(others.filter(other).step_by(101));
    let mut paths = Vec::new();
    for kernel in &list {
        let path = directory.path().join(format!("{}.spv", kernel.name));
        std::fs::write(&path, bytemuck::cast_slice::<u32, u8>(&mended(&words(kernel)?)))?;
        paths.push(path);
    }
    validate(tools, &paths)?;
    // It knows what it judges: each of these it must refuse, and say why.
    let changes: [(&str, Change); 3] = [
        ("BitcastExtractEXT", |op, a| {
            if op == 17 && a == [4232] {
                a[0] = 4229;
            }
        }),
        ("TypeFloat", |op, a| {
            if op == 22 && a[1..] == [4, 4225] {
                a[1] = 8;
            }
        }),
        // A scalar of a vector.
        ("Expected Base to have the same dimension", |op, a| {
            if op == 4195 {
                a[2] = a[3];
            }
        }),
    ];
    for (reason, change) in changes {
        let path = directory.path().join("wrong.spv");
        let wrong = mended(&changed(words(&converting()[0])?, change));
        std::fs::write(&path, bytemuck::cast_slice::<u32, u8>(&wrong))?;
        let Err(failed) = validate(tools, &[path]) else {
            return Err(format!("{reason}: valid").into());
        };
        let message = failed.message().unwrap_or_default();
        assert!(message.contains(reason), "{reason:?} is not in {message}");
    }
    println!("{} modules", list.len());
    Ok(())
}

fn validate(tools: &Path, modules: &[PathBuf]) -> Result<(), Failed> {
    let output = Command::new(tools.join("bin/python"))
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/codegen/spirv_val.py"))
        .arg("vulkan1.3")
        .args(modules)
        .output()
        .map_err(|error| format!("MX_NATIVE_TOOLS={}: {error}", tools.display()))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned().into()),
    }
}

// ---- What decodes E2M1, computed -----------------------------------------------------------------------------------

/// `op_eight` of shaders/lib/nibbles_f16.wgsl and of shaders/lib/nibbles_ocp.wgsl, as SPIR-V: the same bits for every code at every
/// place and every factor, and those of the definition.
fn same_bits() -> Result<(), Failed> {
    let all = kernels::matmul::kernels();
    let find = |name: &str| {
        all.iter().find(|kernel| kernel.name == name).ok_or(format!("there is no {name}"))
    };
    // Both operands of E2M1: codes four apart go together. One of f16: neighbours.
    let (vectors, f16) = ("e2m1-e8m0.1x32-vectors", "f16-vectors");
    for (a, b, apart) in [(vectors, vectors, 4), (vectors, f16, 1), (f16, vectors, 1)] {
        let name = |by| format!("matmul.tensor.{by}16.2x2x1.4x4.{a}.{b}.f32-quads");
        let [decoded, converted] = ["spirv", "ocp"].map(|by| words(find(&name(by))?));
        let (decoded, converted) = (decoded?, converted?);
        let count = [a, b].iter().filter(|x| **x == vectors).count();
        decode([&decoded, &converted], count, apart).map_err(|what| format!("{a} {b}: {what}"))?;
        // What must show.
        let changes: [(&str, Change); 2] = [
            ("another unit", |op, a| {
                if op == 43 && a[2] == 0x0400 {
                    a[2] = 0x0800;
                }
            }),
            ("codes exchanged", |op, a| {
                if op == 80 && a.len() == 4 {
                    a.swap(2, 3);
                }
            }),
        ];
        for (what, change) in changes {
            let converted = changed(converted.clone(), change);
            let hidden = decode([&decoded, &converted], count, apart).is_ok();
            assert!(!hidden, "{a} {b}: {what}");
        }
    }
    Ok(())
}

/// Every code at every place under every factor: `count` decoders in each module give what is defined.
fn decode(modules: [&[u32]; 2], count: usize, apart: u32) -> Result<(), String> {
    // 2^(14 + scale - anchor), as far down as f16 goes; and zero.
    let mut factors: Vec<u16> =
        (-24..=14).map(|x| half::f16::from_f64(2f64.powi(x)).to_bits()).collect();
    factors.push(0);
    let machines = modules.map(Machine::new);
    let functions = machines.each_ref().map(Machine::eights);
    assert_eq!(functions.each_ref().map(Vec::len), [count; 2]);
    for (place, code) in (0..8).flat_map(|place| (0..16).map(move |code| (place, code))) {
        // The other seven go through the codes too.
        let others = 0x1234_5678u32.wrapping_mul(2 * code + 1) ^ 0x9e37_79b9 >> place;
        let w = others & !(15 << (4 * place)) | code << (4 * place);
        for factor in &factors {
            let of = |nibble: u32| {
                let value = e2m1(w >> (4 * nibble) & 15) * 2f64.powi(-14);
                let factor = half::f16::from_bits(*factor).to_f64();
                u32::from(half::f16::from_f64(value * factor).to_bits())
            };
            let first = |i: u32| if apart == 4 { i } else { 2 * i };
            let want: Vec<u32> =
                (0..4).map(|i| of(first(i)) | of(first(i) + apart) << 16).collect();
            let factor = vec![u32::from(*factor); 2];
            for (machine, functions) in machines.iter().zip(&functions) {
                for function in functions {
                    let got = machine.call(*function, vec![vec![w], factor.clone()]);
                    if got != want {
                        return Err(format!("{w:08x} times {factor:x?}: {got:x?}, {want:x?}"));
                    }
                }
            }
        }
    }
    Ok(())
}

/// OCP MX v1.0, 5.3.3: a sign, two bits of exponent with bias 1, one of mantissa.
fn e2m1(code: u32) -> f64 {
    let (exponent, mantissa) = (code >> 1 & 3, f64::from(code & 1) / 2.0);
    let magnitude = match exponent {
        0 => mantissa,
        _ => (1.0 + mantissa) * 2f64.powi(exponent as i32 - 1),
    };
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// The bits of each component.
type Value = Vec<u32>;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Scalar {
    Bool,
    U32,
    F16,
    F32,
    E2m1,
}

/// Computes functions of scalars and vectors, without memory, by SPIR-V's definitions of their instructions.
struct Machine<'a> {
    list: Vec<(u16, &'a [u32])>,
    /// Of components, and how many.
    types: HashMap<u32, (Scalar, usize)>,
    constants: HashMap<u32, Value>,
    /// Where each starts.
    functions: HashMap<u32, usize>,
}

impl<'a> Machine<'a> {
    fn new(words: &'a [u32]) -> Machine<'a> {
        let list = instructions(words);
        let (mut types, mut constants, mut functions) =
            (HashMap::new(), HashMap::<u32, Value>::new(), HashMap::new());
        for (at, (op, a)) in list.iter().enumerate() {
            match (*op, *a) {
                (20, [id]) => drop(types.insert(*id, (Scalar::Bool, 1))),
                (21, [id, 32, 0]) => drop(types.insert(*id, (Scalar::U32, 1))),
                (22, [id, 16]) => drop(types.insert(*id, (Scalar::F16, 1))),
                (22, [id, 32]) => drop(types.insert(*id, (Scalar::F32, 1))),
                (22, [id, 4, 4225]) => drop(types.insert(*id, (Scalar::E2m1, 1))),
                (23, [id, of, n]) => {
                    if let Some((scalar, _)) = types.get(of).copied() {
                        types.insert(*id, (scalar, *n as usize));
                    }
                }
                (41 | 42, [_, id]) => drop(constants.insert(*id, vec![u32::from(*op == 41)])),
                (43, [_, id, value]) => drop(constants.insert(*id, vec![*value])),
                (44, [_, id, parts @ ..]) => {
                    let parts: Option<Vec<_>> =
                        parts.iter().map(|part| constants.get(part).cloned()).collect();
                    if let Some(parts) = parts {
                        constants.insert(*id, parts.concat());
                    }
                }
                (54, a) => drop(functions.insert(a[1], at)),
                _ => {}
            }
        }
        Machine { list, types, constants, functions }
    }

    /// The functions from a word and two f16 to four words.
    fn eights(&self) -> Vec<u32> {
        let is = |id: &u32, ty| self.types.get(id) == Some(&ty);
        let eight = |a: &[u32]| {
            let signature = self.list.iter().find(|(op, of)| *op == 33 && of[0] == a[3]);
            matches!(signature, Some((_, [_, out, w, factor]))
                if is(out, (Scalar::U32, 4)) && is(w, (Scalar::U32, 1)) && is(factor, (Scalar::F16, 2)))
        };
        let functions = self.list.iter().filter(|(op, a)| *op == 54 && eight(a));
        functions.map(|(_, a)| a[1]).collect()
    }

    fn call(&self, function: u32, mut arguments: Vec<Value>) -> Value {
        arguments.reverse();
        let mut values: HashMap<u32, (Scalar, Value)> = HashMap::new();
        let mut at = self.functions[&function];
        loop {
            at += 1;
            let (op, a) = self.list[at];
            let jump = |label: u32| {
                let label = |(op, a): &(u16, &[u32])| *op == 248 && *a == [label];
                self.list.iter().position(label).expect("a label")
            };
            let get = |id: u32| -> Value {
                let constant = || self.constants.get(&id).cloned();
                values.get(&id).map(|(_, v)| v.clone()).or_else(constant).expect("a value")
            };
            match op {
                247 | 248 => continue,
                249 => at = jump(a[0]),
                250 => at = jump(if get(a[0]) == [1] { a[1] } else { a[2] }),
                254 => return get(a[0]),
                55 => {
                    let value = arguments.pop().expect("an argument");
                    values.insert(a[1], (self.types[&a[0]].0, value));
                }
                _ => {
                    let (scalar, n) = self.types[&a[0]];
                    let from = |id: u32| values.get(&id).map(|(scalar, _)| *scalar);
                    let value = self.result(op, (scalar, n), &a[2..], &get, &from);
                    assert_eq!(value.len(), n, "{op} {a:?}");
                    values.insert(a[1], (scalar, value));
                }
            }
        }
    }

    fn result(
        &self,
        op: u16,
        (scalar, n): (Scalar, usize),
        a: &[u32],
        get: &dyn Fn(u32) -> Value,
        from: &dyn Fn(u32) -> Option<Scalar>,
    ) -> Value {
        let one = |f: &dyn Fn(u32) -> u32| get(a[0]).into_iter().map(f).collect();
        let two = |f: &dyn Fn(u32, u32) -> u32| {
            get(a[0]).into_iter().zip(get(a[1])).map(|(x, y)| f(x, y)).collect()
        };
        let f16 = |bits: u32| half::f16::from_bits(bits as u16);
        // A product of two f16 is exact in f32.
        let product = |x, y| u32::from((f16(x) * f16(y)).to_bits());
        match op {
            57 => self.call(a[0], a[1..].iter().map(|id| get(*id)).collect()),
            80 => a.iter().flat_map(|id| get(*id)).collect(),
            81 => vec![get(a[0])[a[1] as usize]],
            // Extended instructions of GLSL.
            12 => {
                let arguments: Vec<Value> = a[2..].iter().map(|id| get(*id)).collect();
                let pairs = || arguments[0].iter().zip(&arguments[1]);
                match a[1] {
                    38 => pairs().map(|(x, y)| *x.min(y)).collect(),
                    41 => pairs().map(|(x, y)| *x.max(y)).collect(),
                    // Unpacking halves: nothing uses its result any more.
                    62 => [0, 16].map(|s| f16(arguments[0][0] >> s).to_f32().to_bits()).to_vec(),
                    other => panic!("GLSL.std.450 {other}"),
                }
            }
            115 => one(&|bits| {
                let value = match from(a[0]) {
                    Some(Scalar::E2m1) => e2m1(bits),
                    Some(Scalar::F16) => f16(bits).to_f64(),
                    Some(Scalar::F32) => f64::from(f32::from_bits(bits)),
                    other => panic!("conversion from {other:?}"),
                };
                match scalar {
                    Scalar::F16 => half::f16::from_f64(value).to_bits().into(),
                    Scalar::F32 => (value as f32).to_bits(),
                    other => panic!("conversion to {other:?}"),
                }
            }),
            124 => match (n, &get(a[0])[..]) {
                (1, [low, high]) => vec![low | high << 16],
                (2, [word]) => vec![word & 0xffff, word >> 16],
                (_, same) => same.to_vec(),
            },
            128 => two(&u32::wrapping_add),
            130 => two(&u32::wrapping_sub),
            133 if scalar == Scalar::F16 => two(&product),
            142 if scalar == Scalar::F16 => {
                let factor = get(a[1])[0];
                one(&|x| product(x, factor))
            }
            169 => {
                let conditions = get(a[0]);
                let parts = get(a[1]).into_iter().zip(get(a[2])).enumerate();
                parts
                    .map(|(i, (yes, no))| match conditions[i % conditions.len()] {
                        0 => no,
                        _ => yes,
                    })
                    .collect()
            }
            174 => two(&|x, y| u32::from(x >= y)),
            194 => two(&|x, shift| x.checked_shr(shift).expect("a defined shift")),
            196 => two(&|x, shift| x.checked_shl(shift).expect("a defined shift")),
            197 => two(&|x, y| x | y),
            199 => two(&|x, y| x & y),
            // SPV_EXT_ocp_microscaling_types: the bits of each component of the base from the offset on, as many as the result's
            // components have, become those of the result; nothing is defined beyond the base's last.
            4195 => {
                let (width, offset) = (4, get(a[1])[0]);
                assert!(scalar == Scalar::E2m1 && offset + width <= 32, "{scalar:?} {offset}");
                one(&|base| base >> offset & ((1 << width) - 1))
            }
            other => panic!("opcode {other}"),
        }
    }
}
