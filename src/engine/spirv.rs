//! WGSL to SPIR-V for what naga cannot say yet, for drivers that take SPIR-V as it is.
//!
//! naga 30 writes the module; some instructions are then put right, each of them local and checked by its pattern:
//! - cooperative matrices A and B loaded from memory typed f32 get the component type f16, which Vulkan allows whatever the
//!   pointer's type is (SPV_KHR_cooperative_matrix), and naga does not; in a module with the line `BF16_FRAGMENTS` it is bfloat16
//!   (SPV_KHR_bfloat16), with `E4M3_FRAGMENTS` it is E4M3 (SPV_EXT_float8), with `I8_FRAGMENTS` a signed integer, and sums i32;
//!   A and B are then as long as that line says, of which naga knows nothing but squares; the product of sums of i32 and a factor
//!   becomes that of their conversion to f32;
//! - `unpack2x16float` followed by the conversion to f16, and the converse, become the bitcast that they are (naga types
//!   `bitcast<vec2<f16>>` wrongly); exact either way;
//! - in a module with the line `E2M1_CONVERSION`, `vec2<f16>(extractBits(words, offset, 4u))` takes four bits as E2M1 and converts
//!   them, instead of an integer (SPV_EXT_ocp_microscaling_types);
//! - a difference of two cooperative matrices becomes the product of their elements, which naga has no expression for;
//! - a `subgroupBarrier` orders workgroup memory among the subgroup, which is all that invocations of a subgroup share (naga
//!   names SubgroupMemory, a storage class that Vulkan does not have).

use std::collections::{HashMap, HashSet};

use naga::back::spv;
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::{Capabilities, ValidationFlags, Validator};

use super::shader::{BF16_FRAGMENTS, E2M1_CONVERSION, E4M3_FRAGMENTS, I8_FRAGMENTS};

/// Instructions of a module: opcode and operands.
type Instruction = (u16, Vec<u32>);

const OP_EXTENSION: u16 = 10;
const OP_EXT_INST: u16 = 12;
const OP_CAPABILITY: u16 = 17;
const OP_TYPE_INT: u16 = 21;
const OP_TYPE_FLOAT: u16 = 22;
const OP_TYPE_VECTOR: u16 = 23;
const OP_CONSTANT: u16 = 43;
const OP_CONSTANT_COMPOSITE: u16 = 44;
const OP_FUNCTION: u16 = 54;
const OP_DECORATE: u16 = 71;
const OP_MEMBER_DECORATE: u16 = 72;
const OP_CONVERT_S_TO_F: u16 = 111;
const OP_CONVERT_U_TO_F: u16 = 112;
const OP_F_CONVERT: u16 = 115;
const OP_BITCAST: u16 = 124;
const OP_F_SUB: u16 = 131;
const OP_F_MUL: u16 = 133;
const OP_MATRIX_TIMES_SCALAR: u16 = 143;
const OP_BIT_FIELD_U_EXTRACT: u16 = 203;
const OP_CONTROL_BARRIER: u16 = 224;
const OP_TYPE_COOPERATIVE_MATRIX: u16 = 4456;
const OP_COOPERATIVE_MATRIX_MUL_ADD: u16 = 4459;
/// Cooperative Matrix Operands: A, B, C and the result have signed components.
const ALL_SIGNED: u32 = 0xf;
const CAPABILITY_INT8: u32 = 39;
const CAPABILITY_BFLOAT16_TYPE: u32 = 5116;
const CAPABILITY_BFLOAT16_COOPERATIVE_MATRIX: u32 = 5118;
const ENCODING_BFLOAT16: u32 = 0;
const CAPABILITY_FLOAT8: u32 = 4212;
const CAPABILITY_FLOAT8_COOPERATIVE_MATRIX: u32 = 4213;
const ENCODING_FLOAT8_E4M3: u32 = 4214;
// SPV_EXT_ocp_microscaling_types revision 1: its tables of FP encodings, capabilities and instructions. The instruction's
// operands: result type, result, what bits are taken of, the first of them. glslang (Vulkan SDK 1.4.357) declares these two
// capabilities and this extension too, not SPV_EXT_float8, on which it is said to build: none of its types is used.
const OP_BITCAST_EXTRACT: u16 = 4195;
const ENCODING_FLOAT4_E2M1: u32 = 4225;
const CAPABILITY_FLOAT4: u32 = 4229;
const CAPABILITY_BITCAST_EXTRACT: u32 = 4232;
const OCP_EXTENSION: &str = "SPV_EXT_ocp_microscaling_types";
/// SPIR-V 1.6, 3.20.
const DECORATION_NO_CONTRACTION: u32 = 42;
/// Acquire and release, of which memory.
const ORDER_SUBGROUP_MEMORY: u32 = 0x88;
const ORDER_WORKGROUP_MEMORY: u32 = 0x108;
const GLSL_U_MIN: u32 = 38;
const GLSL_PACK_HALF_2X16: u32 = 58;
const GLSL_UNPACK_HALF_2X16: u32 = 62;

/// The words of a SPIR-V module for `wgsl`. Indices into workgroup memory are not checked, nor those into bindings beyond
/// what the device does itself: the kernels that come here keep within both.
pub fn compile(wgsl: &str) -> Result<Vec<u32>, String> {
    let module = naga::front::wgsl::parse_str(wgsl).map_err(|error| error.emit_to_string(wgsl))?;
    let capabilities = Capabilities::SHADER_FLOAT16
        | Capabilities::SHADER_FLOAT16_IN_FLOAT32
        | Capabilities::COOPERATIVE_MATRIX
        | Capabilities::SUBGROUP
        | Capabilities::SUBGROUP_BARRIER;
    let info = Validator::new(ValidationFlags::all(), capabilities)
        .subgroup_stages(naga::valid::ShaderStages::COMPUTE)
        .validate(&module)
        .map_err(|error| error.emit_to_string(wgsl))?;
    let options = spv::Options {
        lang_version: (1, 6),
        flags: spv::WriterFlags::empty(),
        bounds_check_policies: BoundsCheckPolicies {
            index: BoundsCheckPolicy::Unchecked,
            buffer: BoundsCheckPolicy::Unchecked,
            image_load: BoundsCheckPolicy::Unchecked,
            binding_array: BoundsCheckPolicy::Unchecked,
        },
        zero_initialize_workgroup_memory: spv::ZeroInitializeWorkgroupMemoryMode::None,
        force_loop_bounding: false,
        emit_int_div_checks: false,
        ..Default::default()
    };
    let words =
        spv::write_vec(&module, &info, &options, None).map_err(|error| error.to_string())?;
    correct(&words, &Component::of(wgsl)?, wgsl.lines().any(|line| line == E2M1_CONVERSION))
}

/// What A and B are made of.
enum Component {
    F16,
    /// Signed integers of eight bits, and positions that a product contracts.
    I8 {
        contracted: u32,
    },
    /// A type that naga does not have: its bits and encoding, what declares it, and positions that a product contracts if not
    /// as many as naga says.
    Other {
        bits: u32,
        encoding: u32,
        extension: &'static str,
        capabilities: [u32; 2],
        contracted: Option<u32>,
    },
}

impl Component {
    /// Positions that a product contracts, if not as many as naga says.
    fn contracted(&self) -> Option<u32> {
        match self {
            Component::F16 => None,
            Component::I8 { contracted } => Some(*contracted),
            Component::Other { contracted, .. } => *contracted,
        }
    }

    fn of(wgsl: &str) -> Result<Component, String> {
        for line in wgsl.lines() {
            if line == BF16_FRAGMENTS {
                return Ok(Component::Other {
                    bits: 16,
                    encoding: ENCODING_BFLOAT16,
                    extension: "SPV_KHR_bfloat16",
                    capabilities: [
                        CAPABILITY_BFLOAT16_TYPE,
                        CAPABILITY_BFLOAT16_COOPERATIVE_MATRIX,
                    ],
                    contracted: None,
                });
            }
            if let Some(k) = line.strip_prefix(I8_FRAGMENTS) {
                let contracted = k.parse().map_err(|_| format!("{line:?}"))?;
                return Ok(Component::I8 { contracted });
            }
            if let Some(k) = line.strip_prefix(E4M3_FRAGMENTS) {
                return Ok(Component::Other {
                    bits: 8,
                    encoding: ENCODING_FLOAT8_E4M3,
                    extension: "SPV_EXT_float8",
                    capabilities: [CAPABILITY_FLOAT8, CAPABILITY_FLOAT8_COOPERATIVE_MATRIX],
                    contracted: Some(k.parse().map_err(|_| format!("{line:?}"))?),
                });
            }
        }
        Ok(Component::F16)
    }
}

/// A string's words: zero-terminated, four bytes each.
fn literal(text: &str) -> Vec<u32> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.resize(text.len() / 4 * 4 + 4, 0);
    bytes.chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect()
}

/// The instructions that give E2M1 codes of a module as f16.
#[derive(Default)]
struct Conversion {
    /// The type of two codes.
    pair: u32,
    /// What takes codes from words, what converts these, and what multiplies the values.
    codes: HashSet<u32>,
    values: HashSet<u32>,
    products: Vec<u32>,
}

fn correct(words: &[u32], fragments: &Component, converts: bool) -> Result<Vec<u32>, String> {
    let (header, mut rest) = words.split_at(5);
    let mut instructions: Vec<Instruction> = Vec::new();
    while let Some(first) = rest.first() {
        let length = (first >> 16) as usize;
        instructions.push((*first as u16, rest[1..length].to_vec()));
        rest = &rest[length..];
    }
    let id = |matches: &dyn Fn(&Instruction) -> bool| {
        instructions.iter().find(|i| matches(i)).map(|i| i.1[0])
    };
    let mut header = header.to_vec();
    let f16 = id(&|(op, a)| *op == OP_TYPE_FLOAT && a[1] == 16);
    // What A and B get, and their length. Word 3 is the bound of the ids.
    let mut fresh = || {
        header[3] += 1;
        header[3] - 1
    };
    let component = match fragments {
        Component::F16 => f16.ok_or("no f16 in the module")?,
        _ => fresh(),
    };
    let length = fragments.contracted().map(|_| fresh());
    let integers = matches!(fragments, Component::I8 { .. });
    let half2 = id(&|(op, a)| *op == OP_TYPE_VECTOR && Some(a[1]) == f16 && a[2] == 2);
    let u32_type = id(&|(op, a)| *op == OP_TYPE_INT && a[1] == 32 && a[2] == 0);
    let workgroup_order = instructions
        .iter()
        .find(|(op, a)| {
            *op == OP_CONSTANT && Some(a[0]) == u32_type && a[2] == ORDER_WORKGROUP_MEMORY
        })
        .map(|(_, a)| a[1]);

    let matrices: HashSet<u32> = instructions
        .iter()
        .filter(|(op, _)| *op == OP_TYPE_COOPERATIVE_MATRIX)
        .map(|(_, a)| a[0])
        .collect();
    let mut conversion = Conversion::default();
    if converts {
        let converted = |(op, a): &&Instruction| *op == OP_CONVERT_U_TO_F && Some(a[0]) == half2;
        conversion.codes = instructions.iter().filter(converted).map(|(_, a)| a[2]).collect();
        fresh();
        conversion.pair = fresh();
    }
    let mut constants = HashMap::new();
    let mut bounded = HashMap::new();
    let mut unpacked = HashMap::new();
    let mut converted = HashMap::new();
    for (op, a) in &mut instructions {
        match *op {
            OP_CONSTANT => {
                constants.insert(a[1], a[2]);
            }
            // Operands: result, component type, scope, rows, columns, use (0 for A, 1 for B).
            OP_TYPE_COOPERATIVE_MATRIX if constants.get(&a[5]).is_some_and(|used| *used < 2) => {
                a[1] = component;
                // A is as wide as B is high.
                if let Some(length) = length {
                    let at = if constants[&a[5]] == 0 { 4 } else { 3 };
                    a[at] = length;
                }
            }
            // Operands: scope of execution, scope of memory, semantics.
            OP_CONTROL_BARRIER if constants.get(&a[2]) == Some(&ORDER_SUBGROUP_MEMORY) => {
                a[2] = workgroup_order.ok_or("no workgroupBarrier besides a subgroupBarrier")?;
            }
            OP_F_SUB if matrices.contains(&a[0]) => *op = OP_F_MUL,
            OP_EXT_INST if a.len() == 6 && a[3] == GLSL_U_MIN => {
                bounded.insert(a[1], a[4]);
            }
            // Operands: result type, result, base, offset, count, the last two bounded by what naga makes sure of.
            OP_BIT_FIELD_U_EXTRACT if conversion.codes.contains(&a[1]) => {
                let [offset, count] = [a[3], a[4]].map(|at| bounded.get(&at).copied());
                if count.and_then(|count| constants.get(&count)) != Some(&4) {
                    return Err("a code of E2M1 that has not four bits".into());
                }
                *op = OP_BITCAST_EXTRACT;
                *a = vec![conversion.pair, a[1], a[2], offset.ok_or("a field of no offset")?];
            }
            OP_CONVERT_U_TO_F if conversion.codes.contains(&a[2]) => {
                *op = OP_F_CONVERT;
                conversion.values.insert(a[1]);
            }
            OP_F_MUL if a[2..].iter().any(|factor| conversion.values.contains(factor)) => {
                conversion.products.push(a[1]);
            }
            OP_EXT_INST if a.len() == 5 && a[3] == GLSL_UNPACK_HALF_2X16 => {
                unpacked.insert(a[1], a[4]);
            }
            OP_F_CONVERT if Some(a[0]) == half2 && unpacked.contains_key(&a[2]) => {
                *op = OP_BITCAST;
                a[2] = unpacked[&a[2]];
            }
            OP_F_CONVERT => {
                converted.insert(a[1], a[2]);
            }
            OP_EXT_INST
                if a.len() == 5
                    && a[3] == GLSL_PACK_HALF_2X16
                    && Some(a[0]) == u32_type
                    && converted.contains_key(&a[4]) =>
            {
                *op = OP_BITCAST;
                *a = vec![a[0], a[1], converted[&a[4]]];
            }
            _ => {}
        }
    }
    if integers {
        integer_sums(&mut instructions, &constants, &mut fresh)?;
    }
    // A type must stand before its first use.
    let matrix = instructions.iter().position(|(op, _)| *op == OP_TYPE_COOPERATIVE_MATRIX);
    if let (Some(length), Some(contracted)) = (length, fragments.contracted()) {
        let matrix = matrix.ok_or("no cooperative matrix in the module")?;
        let u32_type = u32_type.ok_or("no u32 in the module")?;
        instructions.insert(matrix, (OP_CONSTANT, vec![u32_type, length, contracted]));
    }
    match (fragments, matrix) {
        (Component::Other { bits, encoding, extension, capabilities, .. }, Some(matrix)) => {
            instructions.insert(matrix, (OP_TYPE_FLOAT, vec![component, *bits, *encoding]));
            declare(&mut instructions, Some(extension), capabilities);
        }
        (Component::I8 { .. }, Some(matrix)) => {
            instructions.insert(matrix, (OP_TYPE_INT, vec![component, 8, 1]));
            declare(&mut instructions, None, &[CAPABILITY_INT8]);
        }
        (Component::F16, Some(matrix)) => {
            let float = |(op, a): &Instruction| *op == OP_TYPE_FLOAT && a[1] == 16;
            raise(&mut instructions, float, matrix);
        }
        (_, None) => {}
    }
    if converts {
        convert(&mut instructions, conversion)?;
    }
    let mut out = header;
    for (op, operands) in instructions {
        out.push((operands.len() as u32 + 1) << 16 | u32::from(op));
        out.extend(operands);
    }
    Ok(out)
}

/// Moves what matches up to `place`, if it stands below.
fn raise(
    instructions: &mut Vec<Instruction>,
    matches: impl Fn(&Instruction) -> bool,
    place: usize,
) {
    if let Some(at) = instructions.iter().position(matches).filter(|at| *at > place) {
        let instruction = instructions.remove(at);
        instructions.insert(place, instruction);
    }
}

/// Makes sums i32, and what is multiplied by a factor f32 before.
fn integer_sums(
    instructions: &mut Vec<Instruction>,
    constants: &HashMap<u32, u32>,
    fresh: &mut impl FnMut() -> u32,
) -> Result<(), String> {
    let is_i32 = |(op, a): &Instruction| *op == OP_TYPE_INT && a[1] == 32 && a[2] == 1;
    let i32_type = match instructions.iter().find(|i| is_i32(i)) {
        Some((_, a)) => a[0],
        None => {
            let id = fresh();
            instructions.push((OP_TYPE_INT, vec![id, 32, 1]));
            id
        }
    };
    let is_sum = |(op, a): &Instruction| {
        *op == OP_TYPE_COOPERATIVE_MATRIX && constants.get(&a[5]) == Some(&2)
    };
    let at = instructions.iter().position(is_sum).ok_or("no sums in the module")?;
    let sums = instructions[at].1[0];
    let floats = fresh();
    let mut converted = instructions[at].clone();
    converted.1[0] = floats;
    instructions[at].1[1] = i32_type;
    instructions.insert(at + 1, converted);
    raise(instructions, is_i32, at);
    let mut out = Vec::with_capacity(instructions.len());
    for (op, mut a) in instructions.drain(..) {
        match op {
            OP_COOPERATIVE_MATRIX_MUL_ADD => a.push(ALL_SIGNED),
            // Operands: result type, result, matrix, scalar.
            OP_MATRIX_TIMES_SCALAR if a[0] == sums => {
                let values = fresh();
                out.push((OP_CONVERT_S_TO_F, vec![floats, values, a[2]]));
                (a[0], a[2]) = (floats, values);
            }
            // Of other types than naga thinks.
            OP_CONSTANT_COMPOSITE if a[0] == sums => {
                return Err("sums that begin with other than null".into());
            }
            _ => {}
        }
        out.push((op, a));
    }
    *instructions = out;
    Ok(())
}

/// Puts an extension and its capabilities where they belong.
fn declare(instructions: &mut Vec<Instruction>, extension: Option<&str>, capabilities: &[u32]) {
    let first = instructions.iter().take_while(|(op, _)| *op == OP_CAPABILITY).count();
    if let Some(extension) = extension {
        instructions.insert(first, (OP_EXTENSION, literal(extension)));
    }
    for capability in capabilities {
        instructions.insert(first, (OP_CAPABILITY, vec![*capability]));
    }
}

/// Declares what the instructions of a conversion need.
fn convert(instructions: &mut Vec<Instruction>, conversion: Conversion) -> Result<(), String> {
    let Conversion { pair, codes, products, .. } = conversion;
    let extracts =
        instructions.iter().filter(|(op, a)| *op == OP_BITCAST_EXTRACT && codes.contains(&a[1]));
    if codes.is_empty() || extracts.count() != codes.len() {
        return Err("an integer is converted to f16 where codes of E2M1 should be".into());
    }
    let place = |ops: &[u16]| instructions.iter().position(|(op, _)| ops.contains(op));
    let functions = place(&[OP_FUNCTION]).ok_or("no function in the module")?;
    let decorations =
        place(&[OP_DECORATE, OP_MEMBER_DECORATE]).ok_or("no decoration in the module")?;
    let code = pair - 1;
    let types = [
        (OP_TYPE_FLOAT, vec![code, 4, ENCODING_FLOAT4_E2M1]),
        (OP_TYPE_VECTOR, vec![pair, code, 2]),
    ];
    instructions.splice(functions..functions, types);
    // A value times 2^-14 times a factor: the product of the last two would be zero where this is not.
    let exact = products.iter().map(|id| (OP_DECORATE, vec![*id, DECORATION_NO_CONTRACTION]));
    instructions.splice(decorations..decorations, exact);
    declare(instructions, Some(OCP_EXTENSION), &[CAPABILITY_FLOAT4, CAPABILITY_BITCAST_EXTRACT]);
    Ok(())
}
