//! Reads keys and tensors out of a GGUF file, with errors that name them.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use candle_core::Device;
use candle_core::quantized::gguf_file::{Content, Value};

use crate::error::{Error, Result};

/// An open GGUF file.
pub(super) struct Gguf {
    content: Content,
    reader: BufReader<File>,
}

impl Gguf {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|source| Error::Io { path: path.into(), source })?;
        let mut reader = BufReader::new(file);
        let content = Content::read(&mut reader)
            .map_err(|error| Error::NotGguf { path: path.into(), reason: first_line(&error) })?;
        Ok(Self { content, reader })
    }

    pub(super) fn string(&self, key: &str) -> Result<String> {
        self.optional_string(key)?.ok_or_else(|| missing(key, "a string"))
    }

    pub(super) fn optional_string(&self, key: &str) -> Result<Option<String>> {
        let read = |value: &Value| match value {
            Value::String(text) => Ok(text.clone()),
            other => Err(wrong(key, other, "a string")),
        };
        self.content.metadata.get(key).map(read).transpose()
    }

    /// A positive integer.
    pub(super) fn count(&self, key: &str) -> Result<usize> {
        match self.optional_count(key)? {
            Some(0) => Err(Error::WrongKey { key: key.into(), found: "0".into(), expected: "at least 1".into() }),
            Some(count) => Ok(count),
            None => Err(missing(key, "a positive integer")),
        }
    }

    pub(super) fn optional_count(&self, key: &str) -> Result<Option<usize>> {
        let read = |value: &Value| integer(value).ok_or_else(|| wrong(key, value, "an integer that is not negative"));
        self.content.metadata.get(key).map(read).transpose()
    }

    pub(super) fn float(&self, key: &str) -> Result<f64> {
        self.optional_float(key)?.ok_or_else(|| missing(key, "a number"))
    }

    pub(super) fn optional_float(&self, key: &str) -> Result<Option<f64>> {
        let read = |value: &Value| match value {
            Value::F32(number) => Ok(f64::from(*number)),
            Value::F64(number) => Ok(*number),
            other => Err(wrong(key, other, "a float")),
        };
        self.content.metadata.get(key).map(read).transpose()
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>> {
        let read = |value: &Value| match value {
            Value::Bool(flag) => Ok(*flag),
            other => Err(wrong(key, other, "true or false")),
        };
        self.content.metadata.get(key).map(read).transpose()
    }

    pub(super) fn strings(&self, key: &str) -> Result<Vec<String>> {
        let text = |value: &Value| match value {
            Value::String(text) => Ok(text.clone()),
            other => Err(wrong(key, other, "strings only")),
        };
        self.array(key, "an array of strings")?.iter().map(text).collect()
    }

    pub(super) fn counts(&self, key: &str) -> Result<Vec<usize>> {
        let read = |value: &Value| integer(value).ok_or_else(|| wrong(key, value, "integers only"));
        self.array(key, "an array of integers")?.iter().map(read).collect()
    }

    fn array(&self, key: &str, expected: &'static str) -> Result<&[Value]> {
        match self.content.metadata.get(key) {
            Some(Value::Array(values)) => Ok(values),
            Some(other) => Err(wrong(key, other, expected)),
            None => Err(missing(key, expected)),
        }
    }

    pub(super) fn has_tensor(&self, name: &str) -> bool {
        self.content.tensor_infos.contains_key(name)
    }

    /// Rows of a matrix that has `columns` columns.
    pub(super) fn rows(&self, name: &str, columns: usize) -> Result<usize> {
        let Some(info) = self.content.tensor_infos.get(name) else {
            return Err(Error::MissingTensor { name: name.into(), expected: vec![0, columns] });
        };
        match info.shape.dims() {
            [rows, found] if *found == columns => Ok(*rows),
            other => Err(Error::TensorShape { name: name.into(), found: other.to_vec(), expected: vec![0, columns] }),
        }
    }

    /// A tensor's values as f32, outermost dimension first.
    pub(super) fn tensor(&mut self, name: &str, expected: &[usize]) -> Result<Vec<f32>> {
        let Some(info) = self.content.tensor_infos.get(name) else {
            return Err(Error::MissingTensor { name: name.into(), expected: expected.to_vec() });
        };
        if info.shape.dims() != expected {
            return Err(Error::TensorShape {
                name: name.into(),
                found: info.shape.dims().to_vec(),
                expected: expected.to_vec(),
            });
        }
        self.content
            .tensor(&mut self.reader, name, &Device::Cpu)
            .and_then(|tensor| tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1())
            .map_err(|error| Error::TensorData { name: name.into(), reason: first_line(&error) })
    }
}

fn integer(value: &Value) -> Option<usize> {
    match *value {
        Value::U8(n) => Some(n.into()),
        Value::U16(n) => Some(n.into()),
        Value::U32(n) => usize::try_from(n).ok(),
        Value::U64(n) => usize::try_from(n).ok(),
        Value::I8(n) => usize::try_from(n).ok(),
        Value::I16(n) => usize::try_from(n).ok(),
        Value::I32(n) => usize::try_from(n).ok(),
        Value::I64(n) => usize::try_from(n).ok(),
        _ => None,
    }
}

fn missing(key: &str, expected: &'static str) -> Error {
    Error::MissingKey { key: key.into(), expected }
}

fn wrong(key: &str, found: &Value, expected: &str) -> Error {
    let found = match found {
        Value::Array(values) => format!("an array of {}", values.len()),
        other => format!("{other:?}"),
    };
    Error::WrongKey { key: key.into(), found, expected: expected.into() }
}

/// candle's errors may carry a backtrace behind the first line.
fn first_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
