//! Tensors of a PyTorch checkpoint (`torch.save` since version 1.6), without PyTorch.
//!
//! The file is a zip archive of stored entries: `NAME/data.pkl` is a pickle of the saved object in which a tensor is
//! rebuilt from a storage, `NAME/data/KEY` holds a storage's bytes, `NAME/byteorder` says `little`. The pickle is followed,
//! never run: a class that it names is a name here.

mod pickle;

use std::collections::HashMap;
use std::io::{Cursor, Read};

use zip::ZipArchive;

use crate::state_dict::NamedTensor;
use crate::{Dtype, Kind, WeightsError};
use pickle::{Machine, Node, TensorNode};

/// Most bytes of the pickle: names and shapes only, so a real one is small.
const MAX_PICKLE_BYTES: u64 = 64 << 20;
/// Deepest dict in which tensors are looked for; `model_state_dict` holding `compressor` is 2.
const MAX_DEPTH: usize = 8;
/// Most entries of all dicts that are looked at, counting again those of a dict that stands in two places.
const MAX_ENTRIES: usize = 1 << 17;
/// Longest name of a tensor.
const MAX_NAME_BYTES: usize = 1024;

/// Every tensor in the checkpoint, wherever it is among nested dicts; the keys on the way are joined by dots.
///
/// # Errors
/// [`WeightsError::LegacyPytorch`], [`WeightsError::Archive`], [`WeightsError::Pickle`], [`WeightsError::Storage`]. A
/// checkpoint without tensors is an empty list here, which [`crate::state_dict::read`] refuses.
pub fn read(bytes: &[u8]) -> Result<Vec<NamedTensor<'static>>, WeightsError> {
    if Kind::of(bytes) == Some(Kind::Pickle) {
        return Err(WeightsError::LegacyPytorch);
    }
    let mut archive = Archive::open(bytes)?;
    let text = archive.entry("data.pkl", MAX_PICKLE_BYTES)?;
    let mut machine = Machine::default();
    let root = machine.run(&text)?;
    let mut found = Vec::new();
    let mut entries = 0;
    collect(&machine, root, String::new(), 0, &mut entries, &mut found)?;
    found.into_iter().map(|(name, tensor)| archive.tensor(name, tensor)).collect()
}

/// Goes through nested dicts.
fn collect<'m>(
    machine: &'m Machine,
    node: usize,
    name: String,
    depth: usize,
    entries: &mut usize,
    found: &mut Vec<(String, &'m TensorNode)>,
) -> Result<(), WeightsError> {
    match machine.node(node) {
        Node::Tensor(tensor) => found.push((name, tensor)),
        Node::Dict(items) if depth < MAX_DEPTH => {
            for (key, value) in items {
                *entries += 1;
                if *entries > MAX_ENTRIES {
                    let reason = format!("its dicts have more than {MAX_ENTRIES} entries");
                    return Err(WeightsError::Archive { reason });
                }
                let key = match machine.node(*key) {
                    Node::Text(key) => key.clone(),
                    Node::Int(key) => key.to_string(),
                    _ => continue,
                };
                let name = if name.is_empty() { key } else { format!("{name}.{key}") };
                if name.len() > MAX_NAME_BYTES {
                    return Err(WeightsError::Archive {
                        reason: format!("a name has more than {MAX_NAME_BYTES} bytes"),
                    });
                }
                collect(machine, *value, name, depth + 1, entries, found)?;
            }
        }
        _ => {}
    }
    Ok(())
}

struct Archive<'a> {
    zip: ZipArchive<Cursor<&'a [u8]>>,
    /// Folder of all entries, with its slash.
    folder: String,
    /// Bytes of the archive, which no stored entry exceeds.
    size: u64,
    /// Storages by their key: tensors may share one.
    storages: HashMap<String, Vec<u8>>,
    /// Bytes of all tensors so far.
    gathered: u64,
}

impl<'a> Archive<'a> {
    fn open(bytes: &'a [u8]) -> Result<Self, WeightsError> {
        let zip = ZipArchive::new(Cursor::new(bytes)).map_err(|error| damaged("the archive", &error))?;
        let mut names = zip.file_names().filter_map(Result::ok);
        let folder =
            names.find_map(|name| Some(name.strip_suffix("data.pkl")?.to_owned()).filter(|f| f.ends_with('/')));
        drop(names);
        let Some(folder) = folder else {
            return Err(WeightsError::Archive { reason: "the archive has no entry data.pkl".into() });
        };
        let mut archive = Self { zip, folder, size: bytes.len() as u64, storages: HashMap::new(), gathered: 0 };
        // Absent in files of versions before 2.1, which were little endian on every machine that matters.
        let byteorder = format!("{}byteorder", archive.folder);
        if archive.zip.index_for_name(&byteorder).is_some() {
            let order = archive.entry("byteorder", 16)?;
            if order != b"little" {
                let reason = format!("its byte order is {}, expected little", String::from_utf8_lossy(&order));
                return Err(WeightsError::Archive { reason });
            }
        }
        Ok(archive)
    }

    fn entry(&mut self, name: &str, most: u64) -> Result<Vec<u8>, WeightsError> {
        let path = format!("{}{name}", self.folder);
        let entry = self.zip.by_name(&path).map_err(|error| damaged(&path, &error))?;
        let mut bytes = Vec::new();
        let limit = most.min(self.size);
        // The checksum is compared at the end of the entry.
        entry.take(limit + 1).read_to_end(&mut bytes).map_err(|error| damaged(&path, &error))?;
        if bytes.len() as u64 > limit {
            return Err(WeightsError::Archive { reason: format!("{path} has more than {limit} bytes") });
        }
        Ok(bytes)
    }

    /// Gathers a tensor from its storage, whatever its strides.
    fn tensor(&mut self, name: String, tensor: &TensorNode) -> Result<NamedTensor<'static>, WeightsError> {
        let shape = tensor.shape.clone();
        let dtype = match tensor.storage.class.as_str() {
            "HalfStorage" => Ok(Dtype::F16),
            "BFloat16Storage" => Ok(Dtype::Bf16),
            "FloatStorage" => Ok(Dtype::F32),
            "DoubleStorage" => Err("f64".into()),
            other => Err(other.to_owned()),
        };
        let Ok(known) = dtype else {
            return Ok(NamedTensor { name, shape, dtype, bytes: Vec::new().into() });
        };
        let key = &tensor.storage.key;
        if !self.storages.contains_key(key) {
            let bytes = self.entry(&format!("data/{key}"), u64::MAX)?;
            self.storages.insert(key.clone(), bytes);
        }
        let storage = self.storages.get(key).map(Vec::as_slice).unwrap_or_default();
        let bytes = match gather(storage, known.size(), tensor) {
            Ok(bytes) => bytes,
            Err(reason) => return Err(WeightsError::Storage { tensor: name, reason }),
        };
        // Tensors may share a storage, but not so that a small file asks for any amount of memory.
        self.gathered = self.gathered.saturating_add(bytes.len() as u64);
        if self.gathered / 4 > self.size {
            let reason = "its tensors name the same numbers again and again".into();
            return Err(WeightsError::Archive { reason });
        }
        Ok(NamedTensor { name, shape, dtype, bytes: bytes.into() })
    }
}

fn damaged(what: &str, error: &dyn std::error::Error) -> WeightsError {
    WeightsError::Archive { reason: format!("{what}: {error}") }
}

/// Elements of a tensor in row-major order.
fn gather(storage: &[u8], size: usize, tensor: &TensorNode) -> Result<Vec<u8>, String> {
    let TensorNode { shape, strides, offset, .. } = tensor;
    let total = shape.iter().try_fold(1usize, |total, n| total.checked_mul(*n));
    let held = storage.len() / size;
    // Views that repeat elements would let a small file ask for any amount of memory.
    let total = total.filter(|total| *total <= held);
    let total = total.ok_or_else(|| format!("shape {shape:?}, the storage has {held} elements"))?;
    let outside =
        || format!("shape {shape:?} with strides {strides:?} at {offset} leaves its storage of {held} elements");
    if total == 0 {
        return Ok(Vec::new());
    }
    let mut steps = shape.iter().zip(strides).map(|(n, stride)| (n - 1).checked_mul(*stride));
    let last = steps.try_fold(*offset, |last, step| last.checked_add(step?));
    last.filter(|last| *last < held).ok_or_else(outside)?;

    let mut bytes = Vec::with_capacity(total * size);
    let mut place = vec![0usize; shape.len()];
    for _ in 0..total {
        // Within the last element's place, which was checked.
        let at = (offset + place.iter().zip(strides).map(|(i, stride)| i * stride).sum::<usize>()) * size;
        bytes.extend_from_slice(&storage[at..at + size]);
        for (i, n) in place.iter_mut().zip(shape).rev() {
            *i += 1;
            if *i < *n {
                break;
            }
            *i = 0;
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pickle::StorageNode;

    fn tensor(shape: &[usize], strides: &[usize], offset: usize) -> TensorNode {
        let storage = StorageNode { class: "HalfStorage".into(), key: "0".into() };
        TensorNode { storage, offset, shape: shape.into(), strides: strides.into() }
    }

    #[test]
    fn views_are_gathered_and_bounded() {
        let storage: Vec<u8> = (0..24).collect();
        let transposed = gather(&storage, 2, &tensor(&[3, 2], &[1, 3], 0)).unwrap();
        assert_eq!(transposed, [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]);
        assert_eq!(gather(&storage, 2, &tensor(&[2], &[1], 10)).unwrap(), [20, 21, 22, 23]);
        assert_eq!(gather(&storage, 2, &tensor(&[], &[], 1)).unwrap(), [2, 3]);
        for wrong in [
            tensor(&[2], &[1], 11),
            tensor(&[13], &[1], 0),
            tensor(&[3], &[usize::MAX], 0),
            tensor(&[usize::MAX, 2], &[1, 1], 0),
            tensor(&[100], &[0], 0),
        ] {
            assert!(gather(&storage, 2, &wrong).is_err(), "{wrong:?}");
        }
    }
}
