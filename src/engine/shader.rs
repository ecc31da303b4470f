//! Kernels as data: a [`Kernel`] is a complete WGSL module with its bindings, which any host can run.
//!
//! Assembly is plain concatenation: a header of generated constants, the fragments of `shaders/lib`, the
//! body. Variants differ in constants and in which of several fragments with the same functions is used.

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

/// Builds a module from constants and fragments.
#[derive(Default)]
pub(crate) struct Source {
    text: String,
}

impl Source {
    pub(crate) fn new() -> Source {
        Source { text: String::new() }
    }

    pub(crate) fn constant(mut self, name: &str, value: u32) -> Source {
        self.text += &format!("const {name} = {value}u;\n");
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
        self
    }

    /// A fragment for one operand: its `op_` and `OP_` become `a_` and `A_`, say.
    pub(crate) fn operand(self, name: char, text: &str) -> Source {
        let (lower, upper) = (format!("{name}_"), format!("{}_", name.to_ascii_uppercase()));
        self.fragment(&text.replace("op_", &lower).replace("OP_", &upper))
    }

    pub(crate) fn build(self) -> String {
        self.text
    }
}

/// The fragments of `shaders/lib` and the bodies of `shaders`.
macro_rules! shader {
    ($path:literal) => {
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/", $path))
    };
}
pub(crate) use shader;
