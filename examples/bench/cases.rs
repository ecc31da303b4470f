//! The products that are measured.

use std::time::Duration;

use microscaling::kernels::Values;
use microscaling::{
    Context, DType, MXFP4, MXFP6_E2M3, MXFP8_E4M3, MXINT8, Matmul, MatmulDesc, NVFP4, Operand, Tier,
};

use crate::Result;
use crate::measure::Rates;

/// One product.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// What it is an example of.
    pub group: &'static str,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: Values,
    pub b: Values,
    pub tier: Tier,
    /// Experts, of which each row goes to one.
    pub experts: Option<usize>,
    /// Whether a smaller one may stand for it where the time does not suffice.
    pub shrinks: bool,
}

impl Case {
    pub fn desc(&self) -> MatmulDesc {
        let operand = |values| Operand { values, transposed: false };
        MatmulDesc {
            m: self.m,
            n: self.n,
            k: self.k,
            a: operand(self.a),
            b: operand(self.b),
            experts: self.experts,
            tier: self.tier,
            ..Default::default()
        }
    }

    /// The kernel; an error in words if the device does not have it.
    pub fn kernel(&self, ctx: &Context) -> Result<Matmul, String> {
        Matmul::new(ctx, &self.desc()).map_err(|error| error.to_string())
    }

    pub fn shape(&self) -> String {
        let experts = self.experts.map_or_else(String::new, |n| format!("{n} experts "));
        format!("{experts}{} x {} x {}", self.m, self.n, self.k)
    }

    pub fn operands(&self) -> String {
        format!("{} x {}", short(self.a), short(self.b))
    }

    pub fn kind(&self) -> String {
        let grouped = if self.experts.is_some() { ", grouped" } else { "" };
        format!("{}, {}{grouped}", self.tier, self.operands())
    }

    /// Bytes of the weights of one set.
    pub fn lines_b(&self) -> usize {
        self.n * self.experts.unwrap_or(1)
    }
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {}", self.shape(), self.tier, self.operands())
    }
}

/// A format's name without its block, which is the standard one.
pub fn short(values: Values) -> String {
    match values {
        Values::Mx(spec) => spec.name().into(),
        Values::Dense(dtype) => dtype.name().into(),
    }
}

/// How much may be measured.
pub struct Scale {
    pub quick: bool,
    /// A software adapter or the CPU engine.
    pub software: bool,
    /// No case begins after this.
    pub limit: Duration,
    /// Seconds that one product may take.
    pub once: f64,
    /// Seconds of work before the first sample.
    pub warm: f64,
    /// Seconds of samples.
    pub sample: f64,
}

impl Scale {
    pub fn new(quick: bool, software: bool) -> Scale {
        let (limit, once, warm, sample) = match (quick, software) {
            (false, false) => (220, 10.0, 0.5, 0.3),
            (true, false) => (50, 1.0, 0.3, 0.15),
            (false, true) => (150, 0.7, 0.0, 1.2),
            (true, true) => (22, 0.2, 0.0, 0.4),
        };
        Scale { quick, software, limit: Duration::from_secs(limit), once, warm, sample }
    }

    /// The case, or a smaller one that the time suffices for, or why there is none.
    pub fn fit(
        &self,
        ctx: &Context,
        mut case: Case,
        rates: &mut Rates,
    ) -> Result<Result<Case, (Case, String)>> {
        if !self.software {
            return Ok(Ok(case));
        }
        let rate = rates.of(ctx, &case)?;
        loop {
            let seconds = case.desc().flops() / rate;
            if seconds <= self.once {
                return Ok(Ok(case));
            }
            if !case.shrinks || case.n * case.k <= 1 << 16 {
                let why = format!("more than {} s a product, by a first small run", self.once);
                return Ok(Err((case, why)));
            }
            // The tokens stay as long as they are few: they make the kernel.
            if case.m > 64 && case.m * 8 > case.n {
                case.m /= 2;
            }
            let side = if case.n > case.k { &mut case.n } else { &mut case.k };
            *side = (*side / 2).next_multiple_of(64);
        }
    }
}

const MX4: Values = Values::Mx(MXFP4);
const F16: Values = Values::Dense(DType::F16);
const F32: Values = Values::Dense(DType::F32);
const ALL: &[Tier] = &[Tier::Exact, Tier::Tensor, Tier::Alu];
const FAST: &[Tier] = &[Tier::Exact, Tier::Tensor];
const FLOAT: &[Tier] = &[Tier::Tensor, Tier::Alu];

pub fn all(scale: &Scale) -> Vec<Case> {
    let mut cases = Vec::new();
    let full = !scale.quick;
    let mut add = |group, [m, n, k]: [usize; 3], [a, b]: [Values; 2], tiers: &[Tier], experts| {
        for tier in tiers {
            let shrinks = !(group == CUBES && m == n);
            cases.push(Case { group, m, n, k, a, b, tier: *tier, experts, shrinks });
        }
    };
    let two = [MX4, MX4];

    const TOKENS: &str = "few and many tokens";
    for m in [1, 2, 4, 8, 16, 64, 512] {
        if full || [1, 8, 512].contains(&m) {
            add(TOKENS, [m, 4096, 14336], two, ALL, None);
        }
    }
    for m in [1, 8, 16] {
        if full || m == 1 {
            add(TOKENS, [m, 16384, 16384], two, ALL, None);
        }
    }
    for side in [256, 512, 1024, 2048, 4096, 8192, 16384] {
        if full || [256, 1024, 4096].contains(&side) {
            let tiers = if side <= 8192 { ALL } else { FAST };
            add(CUBES, [side; 3], two, tiers, None);
        }
    }

    // 512 tokens, each with 4 of 32 experts; and as many rows with one matrix.
    const EXPERTS: &str = "experts";
    let tiers = if full { ALL } else { FAST };
    add(EXPERTS, [2048, 2880, 2880], two, tiers, Some(32));
    add(EXPERTS, [2048, 2880, 2880], two, tiers, None);

    const FORMATS: &str = "other formats";
    let weights = [F16, MX4];
    for m in [1, 16, 512] {
        if full || m == 1 {
            add(FORMATS, [m, 4096, 14336], weights, FLOAT, None);
        }
    }
    if full {
        add(FORMATS, [4096; 3], weights, FLOAT, None);
    }
    for (spec, tiers) in [(MXFP8_E4M3, FLOAT), (MXFP6_E2M3, ALL), (NVFP4, ALL), (MXINT8, FAST)] {
        let values = [Values::Mx(spec); 2];
        add(FORMATS, [4096; 3], values, if full { tiers } else { &tiers[..1] }, None);
        if full && spec != MXINT8 {
            add(FORMATS, [1, 4096, 14336], values, tiers, None);
            add(FORMATS, [512, 4096, 14336], values, &[tiers[0]], None);
        }
    }

    const BASELINES: &str = "dense baselines";
    for side in [1024, 2048, 4096, 8192] {
        if full || side == 4096 {
            add(BASELINES, [side; 3], [F16; 2], &[Tier::Tensor], None);
        }
        if side <= 4096 && (full || side == 1024) {
            add(BASELINES, [side; 3], [F32; 2], &[Tier::Alu], None);
        }
    }
    if full {
        for m in [1, 512] {
            add(BASELINES, [m, 4096, 14336], [F16; 2], FLOAT, None);
        }
        add(BASELINES, [1, 4096, 14336], [F32; 2], &[Tier::Alu], None);
    }
    cases
}

pub const CUBES: &str = "cubes";
