//! f64 values with a bound of what f32 arithmetic may be off by: running error analysis, operation by operation.

use std::ops::{Add, Div, Mul, Sub};

/// Half a unit in the last place of f32, and what a device may flush.
const UNIT: f64 = 1.0 / (1u64 << 24) as f64;
const TINY: f64 = f32::MIN_POSITIVE as f64;

/// A value, and by how much a computation in f32 may miss it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Approx {
    pub value: f64,
    pub error: f64,
}

impl Approx {
    pub fn exact(value: f64) -> Approx {
        Approx { value, error: 0.0 }
    }

    /// With a rounding of so many half units, WGSL's accuracy of the operation.
    fn rounded(value: f64, error: f64, units: f64) -> Approx {
        Approx { value, error: error + units * UNIT * (value.abs() + error) + TINY }
    }

    /// 3 + 2 · |x| units in the last place.
    pub fn exp(self) -> Approx {
        let value = self.value.exp();
        let error = value * (self.error.exp() - 1.0);
        Approx::rounded(value, error, 2.0 * (3.0 + 2.0 * (self.value.abs() + self.error)))
    }

    /// n terms in any order, each product of them fused with its addition or not: n roundings of no more than the sum of the
    /// magnitudes.
    pub fn sum(terms: impl IntoIterator<Item = Approx>) -> Approx {
        let (mut n, mut value, mut error, mut magnitude) = (0.0, 0.0, 0.0, 0.0);
        for term in terms {
            n += 1.0;
            value += term.value;
            error += term.error;
            magnitude += term.value.abs() + term.error;
        }
        // The second order, for n below 2^16.
        Approx { value, error: error + n * UNIT * 1.01 * magnitude + n * TINY }
    }

    /// After narrowing to bf16, of 8 significant bits, to nearest.
    pub fn narrowed(self) -> Approx {
        Approx::rounded(self.value, self.error, 65536.0)
    }

    pub fn contains(self, got: f32) -> bool {
        (f64::from(got) - self.value).abs() <= self.error
    }
}

impl Add for Approx {
    type Output = Approx;
    fn add(self, other: Approx) -> Approx {
        Approx::rounded(self.value + other.value, self.error + other.error, 1.0)
    }
}

impl Sub for Approx {
    type Output = Approx;
    fn sub(self, other: Approx) -> Approx {
        Approx::rounded(self.value - other.value, self.error + other.error, 1.0)
    }
}

impl Mul for Approx {
    type Output = Approx;
    fn mul(self, other: Approx) -> Approx {
        let error = self.value.abs() * other.error
            + self.error * other.value.abs()
            + self.error * other.error;
        Approx::rounded(self.value * other.value, error, 1.0)
    }
}

/// 2.5 units in the last place.
impl Div for Approx {
    type Output = Approx;
    fn div(self, other: Approx) -> Approx {
        let least = other.value.abs() - other.error;
        assert!(least > 0.0, "a divisor that may be zero");
        let value = self.value / other.value;
        let error = (self.error + value.abs() * other.error) / least;
        Approx::rounded(value, error, 5.0)
    }
}

/// Every element within its bound; says where the first one is not.
pub fn within(what: &str, got: &[f32], want: &[Approx], cols: usize) -> Result<(), String> {
    if got.len() != want.len() {
        return Err(format!("{what}: {} elements, want {}", got.len(), want.len()));
    }
    let wrong: Vec<usize> = (0..got.len()).filter(|i| !want[*i].contains(got[*i])).collect();
    match wrong.first() {
        None => Ok(()),
        Some(at) => Err(format!(
            "{what}: {} of {} are wrong, the first at ({}, {}): {:e}, want {:e} ± {:e}",
            wrong.len(),
            got.len(),
            at / cols,
            at % cols,
            got[*at],
            want[*at].value,
            want[*at].error
        )),
    }
}
