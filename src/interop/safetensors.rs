//! MX tensors in .safetensors files.
//!
//! A .safetensors file holds named tensors and a map of strings, its metadata. An MX tensor `T` of `[rows, cols]` is
//! stored as
//!
//! | tensor | type | shape | |
//! |---|---|---|---|
//! | `T.codes` | U8 | [`Layout::codes_shape`] | packed codes |
//! | `T.scales` | U8 | [`Layout::scales_shape`] | a byte a block |
//! | `T.tensor_scale` | F32 | `[1]` | NVFP4 only: the tensor-wide scale |
//!
//! and one metadata entry that says what they mean, beside the version of this scheme:
//!
//! ```text
//! microscaling.version  = 1
//! microscaling.tensor.T = mxfp4 block=1x32 axis=1 rows=384 cols=1536
//! ```
//!
//! The value is five words, each after one space, in this order: a name of [`NAMED`](crate::formats::NAMED); the block,
//! lines × elements along the axis; the blocked axis; the logical shape. Bytes are those of [`MxTensor`]
//! ([`formats::block`](crate::formats::block) has the bit order); along axis 0 both matrices are the transpose, `cols`
//! lines of `rows` elements. U8 rather than safetensors' own F4 and F8_E8M0, because lines are padded to whole blocks
//! and few readers know these types.
//!
//! **Exact**: what is read back is what was stored, and the same file has the same bytes, whoever writes it.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{self, Write};

pub use ::safetensors::Dtype;
use ::safetensors::{SafeTensorError, SafeTensors};

use crate::formats::{Axis, Block, Layout, MxSpec, MxTensor, ScaleFormat};
use crate::{Error, Result};

/// The metadata key of the scheme's version.
pub const VERSION_KEY: &str = "microscaling.version";
/// The version that this crate writes and reads.
pub const VERSION: &str = "1";
/// The metadata key of an MX tensor, before its name.
pub const TENSOR_KEY: &str = "microscaling.tensor.";

/// What readers accept as a header (the safetensors crate's limit).
const MAX_HEADER_BYTES: usize = 100_000_000;

/// A tensor as a file holds it: little-endian and row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored<'a> {
    /// The type of the elements.
    pub dtype: Dtype,
    /// The shape.
    pub shape: Vec<usize>,
    /// The bytes.
    pub data: Cow<'a, [u8]>,
}

/// The contents of a .safetensors file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TensorFile<'a> {
    /// All tensors by name, the parts of MX tensors among them.
    pub tensors: BTreeMap<String, Stored<'a>>,
    /// The metadata.
    pub metadata: BTreeMap<String, String>,
}

impl<'a> TensorFile<'a> {
    /// Parses a file; tensors are borrowed from it. Checked: the header, and that the tensors fill the file exactly.
    pub fn parse(bytes: &'a [u8]) -> Result<TensorFile<'a>> {
        let (header, parsed) =
            SafeTensors::read_metadata(bytes).map_err(|error| damaged(bytes, &error))?;
        let data = &bytes[8 + header..];
        let metadata = parsed.metadata().iter().flatten();
        Ok(TensorFile {
            tensors: parsed
                .tensors()
                .into_iter()
                .map(|(name, info)| {
                    let (start, end) = info.data_offsets;
                    let data = Cow::Borrowed(&data[start..end]);
                    (name, Stored { dtype: info.dtype, shape: info.shape.clone(), data })
                })
                .collect(),
            metadata: metadata.map(|(key, value)| (key.clone(), value.clone())).collect(),
        })
    }

    /// Writes the file. The same contents give the same bytes: tensors are in the order of the safetensors crate
    /// (larger elements first, then by name), metadata by key.
    pub fn write_to(&self, out: &mut impl Write) -> io::Result<()> {
        let invalid = |problem| io::Error::new(io::ErrorKind::InvalidInput, problem);
        let mut order: Vec<_> = self.tensors.iter().collect();
        order.sort_by(|(a, x), (b, y)| y.dtype.cmp(&x.dtype).then(a.cmp(b)));
        let mut entries = Vec::with_capacity(order.len() + 1);
        if !self.metadata.is_empty() {
            let pairs: Vec<_> =
                self.metadata.iter().map(|(k, v)| format!("{}:{}", json(k), json(v))).collect();
            entries.push(format!("\"__metadata__\":{{{}}}", pairs.join(",")));
        }
        let mut offset = 0;
        for (name, Stored { dtype, shape, data }) in &order {
            let bits = shape.iter().try_fold(dtype.bitsize(), |bits, n| bits.checked_mul(*n));
            if bits != Some(8 * data.len()) {
                let bytes = data.len();
                return Err(invalid(format!(
                    "tensor {name:?}: {bytes} bytes for {dtype} {shape:?}"
                )));
            }
            if *name == "__metadata__" {
                return Err(invalid(format!("a tensor cannot be named {name:?}")));
            }
            let end = offset + data.len();
            entries.push(format!(
                "{}:{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{offset},{end}]}}",
                json(name)
            ));
            offset = end;
        }
        let mut header = format!("{{{}}}", entries.join(","));
        // The data starts at a multiple of eight bytes.
        header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
        if header.len() > MAX_HEADER_BYTES {
            return Err(invalid(format!(
                "a header of {} bytes; readers accept {MAX_HEADER_BYTES}",
                header.len()
            )));
        }
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(header.as_bytes())?;
        order.iter().try_for_each(|(_, tensor)| out.write_all(&tensor.data))
    }

    /// Adds the parts of an MX tensor and its metadata. Names that are taken already are an error, and leave the file
    /// as it was.
    pub fn insert_mx(&mut self, name: &str, tensor: MxTensor) -> Result<()> {
        self.check_free(name, tensor.layout().spec)?;
        let layout = *tensor.layout();
        let (codes, scales, tensor_scale) = tensor.into_parts();
        let data = [codes, scales, tensor_scale.to_le_bytes().to_vec()];
        for (part, data) in parts(&layout).into_iter().zip(data) {
            let stored = Stored { dtype: part.dtype, shape: part.shape, data: Cow::Owned(data) };
            self.tensors.insert(format!("{name}.{}", part.suffix), stored);
        }
        self.metadata.insert(VERSION_KEY.into(), VERSION.into());
        self.metadata.insert(format!("{TENSOR_KEY}{name}"), describe(&layout));
        Ok(())
    }

    /// Checks that [`TensorFile::insert_mx`] can add a tensor of this name and format.
    pub fn check_free(&self, name: &str, spec: MxSpec) -> Result<()> {
        if self.metadata.contains_key(VERSION_KEY) {
            self.check_version()?;
        }
        let taken = |part: &str| self.tensors.contains_key(part).then(|| part.to_string());
        match suffixes(spec).iter().find_map(|suffix| taken(&format!("{name}.{suffix}"))) {
            None => Ok(()),
            Some(part) => Err(invalid(
                name,
                format_args!("its part {part:?} is the name of another tensor; rename one"),
            )),
        }
    }

    /// The names of the MX tensors, sorted. Nothing is checked yet.
    pub fn mx_names(&self) -> Vec<String> {
        self.metadata
            .keys()
            .filter_map(|key| key.strip_prefix(TENSOR_KEY))
            .map(Into::into)
            .collect()
    }

    /// The layout of an MX tensor. Checked: the metadata, and that every part is there with the type and shape that it
    /// says.
    pub fn mx_layout(&self, name: &str) -> Result<Layout> {
        let Some(text) = self.metadata.get(&format!("{TENSOR_KEY}{name}")) else {
            return Err(invalid(
                name,
                format_args!("not an MX tensor: no metadata {TENSOR_KEY}{name}"),
            ));
        };
        self.check_version()?;
        let layout = parse(text)
            .map_err(|problem| invalid(name, format_args!("metadata {text:?}: {problem}")))?;
        for part in parts(&layout) {
            let part_name = format!("{name}.{}", part.suffix);
            let Some(stored) = self.tensors.get(&part_name) else {
                return Err(invalid(
                    name,
                    format_args!("{part_name:?} is missing; quantize the original again"),
                ));
            };
            if (stored.dtype, &stored.shape) != (part.dtype, &part.shape) {
                return Err(invalid(
                    name,
                    format_args!(
                        "{part_name:?} is {} {:?}, but by the metadata {text:?} it is {} {:?}; quantize the original \
                         again",
                        stored.dtype, stored.shape, part.dtype, part.shape
                    ),
                ));
            }
        }
        Ok(layout)
    }

    /// Reads an MX tensor, with the checks of [`TensorFile::mx_layout`] and [`MxTensor::from_parts`].
    pub fn mx(&self, name: &str) -> Result<MxTensor> {
        let layout = self.mx_layout(name)?;
        let data = |suffix| -> &[u8] {
            self.tensors.get(&format!("{name}.{suffix}")).map_or(&[], |stored| &stored.data)
        };
        let tensor_scale = match layout.spec.scale {
            ScaleFormat::E8M0 => 1.0,
            // Not four bytes only if the caller put it together so; NaN is refused below.
            ScaleFormat::E4M3 => {
                data("tensor_scale").try_into().map_or(f32::NAN, f32::from_le_bytes)
            }
        };
        MxTensor::from_parts(layout, data("codes").into(), data("scales").into(), tensor_scale)
            .map_err(|error| invalid(name, format_args!("{error}; quantize the original again")))
    }

    /// Takes out what belongs to an MX tensor: its parts and its metadata, and the version with the last one.
    pub fn remove_mx(&mut self, name: &str) -> Result<()> {
        for suffix in suffixes(self.mx_layout(name)?.spec) {
            self.tensors.remove(&format!("{name}.{suffix}"));
        }
        self.metadata.remove(&format!("{TENSOR_KEY}{name}"));
        if !self.metadata.keys().any(|key| key.starts_with(TENSOR_KEY)) {
            self.metadata.remove(VERSION_KEY);
        }
        Ok(())
    }

    fn check_version(&self) -> Result<()> {
        match self.metadata.get(VERSION_KEY).map(String::as_str) {
            Some(VERSION) => Ok(()),
            found => Err(Error::InvalidData(format!(
                "metadata {VERSION_KEY} is {found:?}, and this crate reads {VERSION:?}; use the version of the crate \
                 that wrote the file"
            ))),
        }
    }
}

struct Part {
    suffix: &'static str,
    dtype: Dtype,
    shape: Vec<usize>,
}

fn suffixes(spec: MxSpec) -> &'static [&'static str] {
    match spec.scale {
        ScaleFormat::E8M0 => &["codes", "scales"],
        ScaleFormat::E4M3 => &["codes", "scales", "tensor_scale"],
    }
}

fn parts(layout: &Layout) -> Vec<Part> {
    let describe = |suffix: &&'static str| match *suffix {
        "codes" => (Dtype::U8, layout.codes_shape().to_vec()),
        "scales" => (Dtype::U8, layout.scales_shape().to_vec()),
        _ => (Dtype::F32, vec![1]),
    };
    suffixes(layout.spec)
        .iter()
        .map(|suffix| {
            let (dtype, shape) = describe(suffix);
            Part { suffix, dtype, shape }
        })
        .collect()
}

/// The metadata of a tensor.
fn describe(layout: &Layout) -> String {
    let Layout { spec, axis, rows, cols } = layout;
    format!("{} block={} axis={axis} rows={rows} cols={cols}", spec.name(), spec.block)
}

/// The inverse of [`describe`].
fn parse(text: &str) -> Result<Layout, String> {
    let words: Vec<_> = text.split(' ').collect();
    let [format, block, axis, rows, cols] = words[..] else {
        return Err("not \"FORMAT block=LxN axis=A rows=R cols=C\"".into());
    };
    let value = |word: &str, key: &str| {
        let value = word.strip_prefix(key).and_then(|rest| rest.strip_prefix('='));
        value.map(str::to_string).ok_or_else(|| format!("{word:?} is not {key}=…"))
    };
    let size = |word: &str, key: &str| {
        let text = value(word, key)?;
        // Beyond 2^48 no tensor exists, and sizes would overflow.
        let n: Option<usize> = text.parse().ok().filter(|n| *n as u64 <= 1 << 48);
        n.filter(|n| n.to_string() == text).ok_or_else(|| format!("{word:?} is not a size"))
    };
    let spec = MxSpec::by_name(format).map_err(|error| error.to_string())?;
    let block = value(block, "block")?;
    let block = Block::ALL.into_iter().find(|b| b.to_string() == block).ok_or_else(|| {
        format!("block {block:?} is none of {}", Block::ALL.map(|b| b.to_string()).join(", "))
    })?;
    let axis = match value(axis, "axis")?.as_str() {
        "0" => Axis::Zero,
        "1" => Axis::One,
        other => return Err(format!("axis {other:?} is neither 0 nor 1")),
    };
    Layout::new(spec.with_block(block), axis, size(rows, "rows")?, size(cols, "cols")?)
        .map_err(|error| error.to_string())
}

fn invalid(name: &str, problem: impl std::fmt::Display) -> Error {
    Error::InvalidData(format!("tensor {name:?}: {problem}"))
}

fn damaged(bytes: &[u8], error: &SafeTensorError) -> Error {
    let len = bytes.len();
    let problem = match error {
        SafeTensorError::HeaderTooSmall => format!("{len} bytes are too few for a header"),
        SafeTensorError::InvalidHeaderLength | SafeTensorError::HeaderTooLarge => {
            let claim = bytes.first_chunk().map_or(0, |n| u64::from_le_bytes(*n));
            format!("the header claims {claim} bytes, the file has {len}")
        }
        SafeTensorError::MetadataIncompleteBuffer => {
            format!(
                "the tensors that the header lists do not end where the file of {len} bytes does"
            )
        }
        SafeTensorError::InvalidOffset(name) => {
            format!("the header gives tensor {name:?} offsets that overlap or leave a gap")
        }
        SafeTensorError::TensorInvalidInfo => {
            "the header gives a tensor offsets that are not its shape's size".into()
        }
        other => other.to_string(),
    };
    Error::InvalidData(format!(
        "{problem}; this is no .safetensors file, or a damaged one: fetch or write it again"
    ))
}

fn json(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c < ' ' => out.push_str(&format!("\\u{:04x}", c as u32)),
            c => out.push(c),
        }
    }
    out + "\""
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{MXFP4, MXFP6_E2M3, NVFP4, QuantizeDesc};

    fn sample(spec: MxSpec, axis: Axis) -> MxTensor {
        let x: Vec<f32> = (0..5 * 37).map(|i| (i as f32).sin()).collect();
        MxTensor::quantize(&x, 5, 37, &QuantizeDesc { spec, axis, ..Default::default() }).unwrap()
    }

    fn bytes(file: &TensorFile<'_>) -> Vec<u8> {
        let mut out = Vec::new();
        file.write_to(&mut out).unwrap();
        out
    }

    #[test]
    fn what_is_stored_is_read_back() {
        let mut file = TensorFile::default();
        let mut all = BTreeMap::new();
        for (i, spec) in
            [MXFP4, MXFP6_E2M3, NVFP4, MXFP4.with_block(Block::Square(16))].into_iter().enumerate()
        {
            for axis in [Axis::Zero, Axis::One] {
                let (name, tensor) = (format!("t{i}.{axis}"), sample(spec, axis));
                file.insert_mx(&name, tensor.clone()).unwrap();
                all.insert(name, tensor);
            }
        }
        file.metadata.insert("quote\"\\\n".into(), "ü\u{1}".into());
        let written = bytes(&file);
        assert_eq!(bytes(&file.clone()), written);
        // Another reader agrees about every byte.
        let other = SafeTensors::deserialize(&written).unwrap();
        let mut back = TensorFile::parse(&written).unwrap();
        assert_eq!(back, file);
        assert_eq!(back.mx_names(), all.keys().cloned().collect::<Vec<_>>());
        for (name, tensor) in &all {
            assert_eq!(back.mx(name).unwrap(), *tensor);
            assert_eq!(other.tensor(&format!("{name}.codes")).unwrap().data(), tensor.codes());
            back.remove_mx(name).unwrap();
        }
        assert!(back.tensors.is_empty());
        assert_eq!(back.metadata.len(), 1);
    }

    #[test]
    fn the_header_is_this() {
        let mut file = TensorFile::default();
        file.insert_mx("w", sample(NVFP4, Axis::Zero)).unwrap();
        let written = bytes(&file);
        let length = u64::from_le_bytes(*written.first_chunk().unwrap()) as usize;
        assert_eq!(
            std::str::from_utf8(&written[8..8 + length]).unwrap().trim_end(),
            concat!(
                r#"{"__metadata__":{"microscaling.tensor.w":"nvfp4 block=1x16 axis=0 rows=5 cols=37","#,
                r#""microscaling.version":"1"},"#,
                r#""w.tensor_scale":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"#,
                r#""w.codes":{"dtype":"U8","shape":[37, 8],"data_offsets":[4,300]},"#,
                r#""w.scales":{"dtype":"U8","shape":[37, 1],"data_offsets":[300,337]}}"#
            )
        );
    }

    #[test]
    fn lies_are_errors_that_name_the_tensor() {
        let mut good = TensorFile::default();
        good.insert_mx("w", sample(NVFP4, Axis::One)).unwrap();
        let key = format!("{TENSOR_KEY}w");
        let fails = |what: &str, change: &dyn Fn(&mut TensorFile<'_>)| {
            let mut file = good.clone();
            change(&mut file);
            match file.mx("w") {
                Err(Error::InvalidData(message)) => {
                    assert!(message.contains(what), "{message:?} lacks {what:?}");
                }
                other => panic!("{what}: {other:?}"),
            }
        };
        for (text, what) in [
            ("", "not \"FORMAT"),
            ("nvfp4 block=1x16 axis=1 rows=5", "not \"FORMAT"),
            ("nvfp4  block=1x16 axis=1 rows=5 cols=37", "not \"FORMAT"),
            ("nvfp5 block=1x16 axis=1 rows=5 cols=37", "unknown format"),
            ("nvfp4 block=1x24 axis=1 rows=5 cols=37", "none of 1x16, 1x32"),
            ("nvfp4 block=1x16 axis=2 rows=5 cols=37", "neither 0 nor 1"),
            ("nvfp4 block=1x16 axis=1 rows=-5 cols=37", "not a size"),
            ("nvfp4 block=1x16 axis=1 rows=05 cols=37", "not a size"),
            ("nvfp4 block=1x16 axis=1 rows=5 cols=18446744073709551615", "not a size"),
            ("nvfp4 block=1x16 axis=1 rows=281474976710656 cols=2", "2^48"),
            ("nvfp4 block=1x16 axis=1 cols=37 rows=5", "not rows="),
            ("nvfp4 block=1x16 axis=1 rows=6 cols=37", "tensor \"w\": \"w.codes\" is U8 [5, 24]"),
            ("nvfp4 block=1x32 axis=1 rows=5 cols=37", "w.codes"),
            ("nvfp4 block=1x16 axis=0 rows=5 cols=37", "w.codes"),
            ("mxfp8-e4m3 block=1x16 axis=1 rows=5 cols=37", "w.codes"),
        ] {
            fails(what, &|file| {
                file.metadata.insert(key.clone(), text.into());
            });
        }
        for part in ["w.codes", "w.scales", "w.tensor_scale"] {
            fails(&format!("{part:?} is missing"), &|file| {
                file.tensors.remove(part);
            });
            fails(&format!("{part:?} is I8"), &|file| {
                file.tensors.get_mut(part).unwrap().dtype = Dtype::I8;
            });
            fails("tensor \"w\"", &|file| {
                file.tensors.get_mut(part).unwrap().data = Cow::Borrowed(&[0]);
            });
        }
        fails("not a positive normal f32", &|file| {
            file.tensors.get_mut("w.tensor_scale").unwrap().data = Cow::Borrowed(&[0; 4]);
        });
        fails("not an MX tensor", &|file| {
            file.metadata.remove(&key);
        });
        fails(VERSION_KEY, &|file| {
            file.metadata.insert(VERSION_KEY.into(), "2".into());
        });
        fails(VERSION_KEY, &|file| {
            file.metadata.remove(VERSION_KEY);
        });
    }

    #[test]
    fn names_that_are_taken_are_errors() {
        let mut file = TensorFile::default();
        let stored = Stored { dtype: Dtype::U8, shape: vec![1], data: vec![7].into() };
        file.tensors.insert("w.scales".into(), stored);
        let before = file.clone();
        let error = file.insert_mx("w", sample(MXFP4, Axis::One)).unwrap_err().to_string();
        assert!(error.contains("w.scales"), "{error}");
        assert_eq!(file, before);
    }

    #[test]
    fn contents_that_are_no_file_are_errors() {
        let stored = Stored { dtype: Dtype::F32, shape: vec![2], data: vec![0; 4].into() };
        let mut file = TensorFile::default();
        file.tensors.insert("w".into(), stored.clone());
        assert!(file.write_to(&mut Vec::new()).is_err());
        file.tensors.clear();
        file.tensors.insert("__metadata__".into(), Stored { shape: vec![1], ..stored });
        assert!(file.write_to(&mut Vec::new()).is_err());
    }
}
