//! Kernels as data: a [`Kernel`] is a complete WGSL module with its bindings, which any host can run.
//!
//! Assembly is plain concatenation: a header of generated constants, the fragments of `shaders/lib`, the
//! body. Variants differ in constants and in which of several fragments with the same functions is used. One thing is
//! expanded: a `for` that ends its line with `// unroll`, because drivers keep an array in registers only where every index
//! into it is a constant, and do not unroll by themselves reliably.

use std::collections::HashMap;

use crate::engine::buffer::DType;

/// The fragments of `shaders/lib` and the bodies of `shaders`.
macro_rules! shader {
    ($path:literal) => {
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/", $path))
    };
}
pub(crate) use shader;

/// What a binding of group 0 is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binding {
    /// A uniform buffer with the kernel's `Params`.
    Params,
    /// A storage buffer that is read.
    Read,
    /// A storage buffer that is written, and maybe read.
    Write,
}

/// One compute shader: everything a host needs to build and dispatch it.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// A unique name that says the variant, e.g. `quantize.e2m1-e8m0.1x32.f32.nearest.contiguous.subgroup`.
    pub name: String,
    /// The WGSL module; its entry point is `main`.
    pub wgsl: String,
    /// Group 0's bindings, in order. The shader's `Params` and comments say what they hold.
    pub bindings: Vec<Binding>,
    /// Invocations of a workgroup, along x.
    pub workgroup_size: u32,
    /// What the shader needs of the device.
    pub features: wgpu::Features,
    /// Whether the WGSL must be compiled by [`crate::engine::spirv`] and handed over as SPIR-V.
    pub spirv: bool,
}

impl Kernel {
    /// A kernel of the usual workgroups that needs nothing of the device: parameters, then these bindings.
    pub(crate) fn portable(name: String, source: Source, bindings: &[Binding]) -> Kernel {
        Kernel {
            name,
            wgsl: source.build(),
            bindings: std::iter::once(Binding::Params).chain(bindings.iter().copied()).collect(),
            workgroup_size: crate::kernels::WORKGROUP,
            features: wgpu::Features::empty(),
            spirv: false,
        }
    }
}

/// The line of WGSL that asks [`crate::engine::spirv`] for fragments of bfloat16.
pub(crate) const BF16_FRAGMENTS: &str = "// fragments: bf16";
/// The same for fragments of E4M3; then follows how many positions they contract.
pub(crate) const E4M3_FRAGMENTS: &str = "// fragments: e4m3, k = ";
/// The same for fragments of eight-bit integers, with sums of 32 bits.
pub(crate) const I8_FRAGMENTS: &str = "// fragments: i8, k = ";
/// The same for codes of E2M1 that the device converts: four bits that `extractBits` takes and that become f16.
pub(crate) const E2M1_CONVERSION: &str = "// four bits to f16: e2m1";

/// The line of WGSL that says that a kernel keeps within its workgroup memory and its bindings, so that indices are not
/// compared with their sizes: a kernel that spends much of its time on workgroup memory gains by it. What the device itself
/// does about bindings stays.
pub(crate) const UNCHECKED: &str = "// indices: unchecked";

/// Builds a module from constants and fragments.
#[derive(Default)]
pub(crate) struct Source {
    text: String,
    /// What `constant` was told, for the bounds of loops.
    values: HashMap<String, u32>,
}

impl Source {
    pub(crate) fn new() -> Source {
        Source::default()
    }

    pub(crate) fn constant(mut self, name: &str, value: u32) -> Source {
        self.text += &format!("const {name} = {value}u;\n");
        self.values.insert(name.into(), value);
        self
    }

    pub(crate) fn signed(mut self, name: &str, value: i32) -> Source {
        self.text += &format!("const {name} = {value}i;\n");
        self
    }

    pub(crate) fn flag(mut self, name: &str, value: bool) -> Source {
        self.text += &format!("const {name} = {value};\n");
        self
    }

    pub(crate) fn fragment(mut self, text: &str) -> Source {
        self.text += "\n";
        self.text += text;
        self
    }

    pub(crate) fn line(mut self, text: &str) -> Source {
        self.text += text;
        self.text.push('\n');
        self
    }

    pub(crate) fn append(mut self, other: Source) -> Source {
        self.text += &other.text;
        self.values.extend(other.values);
        self
    }

    /// A fragment for one operand: its `op_` and `OP_` become `a_` and `A_`, say.
    pub(crate) fn operand(self, name: char, text: &str) -> Source {
        let (lower, upper) = (format!("{name}_"), format!("{}_", name.to_ascii_uppercase()));
        self.fragment(&text.replace("op_", &lower).replace("OP_", &upper))
    }

    /// `NAME_Quad`, `NAME_get` and `NAME_set` for a dense binding whose rows are whole quads: see `shaders/lib/quad_f32.wgsl`.
    pub(crate) fn quads(self, name: &str, dtype: DType) -> Source {
        let text = match dtype {
            DType::F32 => shader!("lib/quad_f32.wgsl"),
            DType::BF16 => shader!("lib/quad_bf16.wgsl"),
            DType::F16 => unreachable!("the kernels of training check that there is no f16"),
        };
        self.fragment(&text.replace("op_", &format!("{name}_")))
    }

    /// Appends another source in a namespace: everything that it declares gets the prefix. So a kernel can hold one codec
    /// twice, with different constants.
    pub(crate) fn module(mut self, prefix: &str, other: Source) -> Source {
        let mut text = other.text;
        for name in declarations(&text) {
            text = replace_word(&text, &name, &format!("{prefix}{name}"));
        }
        self.text += "\n";
        self.text += &text;
        self.values
            .extend(other.values.into_iter().map(|(name, v)| (format!("{prefix}{name}"), v)));
        self
    }

    pub(crate) fn build(self) -> String {
        let mut out = String::new();
        unroll(&self.text, &self.values, &mut out);
        out
    }
}

/// What a module declares: lines that start with `fn`, `const`, `struct`, `alias`, `var` or a binding's attributes.
fn declarations(text: &str) -> Vec<String> {
    let name = |line: &str| {
        let rest = match line.split_once(' ')? {
            ("fn" | "const" | "struct" | "alias", rest) => rest,
            _ if line.starts_with("var<") || line.starts_with("@group") => line.split_once("> ")?.1,
            _ => return None,
        };
        let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        Some(rest[..end].to_string())
    };
    text.lines().filter_map(name).collect()
}

/// Copies `text` with its loops marked `// unroll` written out. Their form is
/// `for (var i = 0u; i < BOUND; i++) {`, BOUND a product or quotient of constants and literals.
fn unroll(text: &str, values: &HashMap<String, u32>, out: &mut String) {
    let mut rest = text;
    while let Some(mark) = rest.find("// unroll\n") {
        let start = rest[..mark].rfind('\n').map_or(0, |at| at + 1);
        out.push_str(&rest[..start]);
        let head = &rest[start..mark];
        let (name, bound) = head
            .trim()
            .strip_prefix("for (var ")
            .and_then(|head| head.split_once(" = 0u; "))
            .and_then(|(name, head)| {
                let bound = head.strip_prefix(name)?.strip_prefix(" < ")?;
                Some((name, bound.split(';').next()?))
            })
            .unwrap_or_else(|| panic!("a loop that cannot be unrolled: {head}"));
        let body = &rest[mark + "// unroll\n".len()..];
        let mut depth = 1;
        let end = body
            .char_indices()
            .find(|(_, c)| {
                depth += i32::from(*c == '{') - i32::from(*c == '}');
                depth == 0
            })
            .map_or(body.len(), |(at, _)| at);
        for i in 0..evaluate(bound, values) {
            out.push_str("{\n");
            unroll(&replace_word(&body[..end], name, &format!("{i}u")), values, out);
            out.push_str("}\n");
        }
        rest = &body[end + 1..];
    }
    out.push_str(rest);
}

fn evaluate(expression: &str, values: &HashMap<String, u32>) -> u32 {
    let mut result = 1;
    let mut divide = false;
    for token in expression.split_whitespace() {
        match token {
            "*" => divide = false,
            "/" => divide = true,
            _ => {
                let literal = token.strip_suffix('u').and_then(|digits| digits.parse().ok());
                let value = literal
                    .or_else(|| values.get(token).copied())
                    .unwrap_or_else(|| panic!("{token} is no constant of this kernel"));
                result = if divide { result / value } else { result * value };
            }
        }
    }
    result
}

/// Replaces `word` where it stands alone.
fn replace_word(text: &str, word: &str, by: &str) -> String {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(word) {
        out.push_str(&rest[..at]);
        let alone = !out.ends_with(part)
            && !out.ends_with('.')
            && !rest[at + word.len()..].starts_with(part);
        out.push_str(if alone { by } else { word });
        rest = &rest[at + word.len()..];
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_have_their_own_names() {
        let text = "@group(0) @binding(1) var<storage, read> y: array<u32>;\nconst K = N;\nstruct S { m: u32 }\nfn f(s: S) -> u32 { return y[K] + s.m + other(g.y); }\n";
        let built =
            Source::new().module("a_", Source::new().constant("N", 2).fragment(text)).build();
        assert!(built.contains("a_y: array") && built.contains("const a_K = a_N;"), "{built}");
        assert!(
            built.contains("fn a_f(s: a_S) -> u32 { return a_y[a_K] + s.m + other(g.y); }"),
            "{built}"
        );
    }

    #[test]
    fn loops_are_unrolled() {
        let text = "a\n  for (var i = 0u; i < N / 2u; i++) { // unroll\n    x[i] = i + ii; if (b) { c(i); }\n  }\nz\n";
        let built = Source::new().constant("N", 4).fragment(text).build();
        assert!(built.contains("x[0u] = 0u + ii; if (b) { c(0u); }"), "{built}");
        assert!(built.contains("x[1u] = 1u + ii; if (b) { c(1u); }"), "{built}");
        assert!(!built.contains("x[2u]") && !built.contains("for") && built.ends_with("\nz\n"));
    }
}
