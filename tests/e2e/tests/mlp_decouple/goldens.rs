//! The plugin behind the C API against PyTorch in f64 (`tests/goldens/mlp_decouple.py`), with weights that come from
//! the checkpoints beside the numbers, by the code of `kvhook convert`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use kvhook_abi::raw::*;
use kvhook_host::raw::*;
use kvhook_mlp_weights::state_dict::{self, Choice};
use kvhook_mlp_weights::{Stored, pytorch, v1, v2};
use safetensors::SafeTensors;
use serde_json::Value;

use super::engine::{Dtype, Engine, Shape};

/// Layers, KV heads and head_dim of the goldens.
const LAYERS: usize = 2;
const HEADS: usize = 3;
const DIM: usize = 8;

/// f32 products and sums, relative to the largest number of the row.
const SUMS: f64 = 1e-5;

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../goldens/mlp_decouple").join(name)
}

/// A tensor `[layers, kv heads, tokens, head_dim]`.
struct Rows {
    tokens: usize,
    values: Vec<f64>,
}

impl Rows {
    fn row(&self, layer: usize, head: usize, token: usize) -> &[f64] {
        let at = ((layer * HEADS + head) * self.tokens + token) * DIM;
        &self.values[at..at + DIM]
    }
}

struct Case {
    name: String,
    min_groups: u64,
    segments: Vec<KvhSegment>,
    tokens: u64,
}

impl Case {
    fn new(value: &Value) -> Self {
        let mut tokens = 0;
        let mut segments = Vec::new();
        for segment in value["segments"].as_array().unwrap() {
            let kind = if segment[0] == "text" { KVH_SEGMENT_TEXT } else { KVH_SEGMENT_IMAGE };
            let length = segment[1].as_u64().unwrap();
            segments.push(KvhSegment { kind, reserved0: 0, start: tokens, length });
            tokens += length;
        }
        let min_groups = value["min_groups"].as_u64().unwrap();
        Self { name: value["name"].as_str().unwrap().into(), min_groups, segments, tokens }
    }

    /// FastCache's rule has no text before an image.
    fn image_rules(&self) -> &'static [&'static str] {
        let middle = self.segments.iter().skip(1).any(|segment| segment.kind == KVH_SEGMENT_IMAGE);
        if middle { &["segments"] } else { &["segments", "prefix"] }
    }
}

/// The goldens of one factor.
struct Goldens {
    factor: usize,
    cases: Vec<Case>,
    tensors: HashMap<String, Rows>,
}

impl Goldens {
    fn read(factor: usize) -> Self {
        let bytes = std::fs::read(path(&format!("f{factor}.safetensors"))).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let cases: Value = serde_json::from_str(&header.metadata().as_ref().unwrap()["cases"]).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let read = |(name, view): (&str, safetensors::tensor::TensorView<'_>)| {
            let pairs = || view.data().chunks(2).map(|bytes| [bytes[0], bytes[1]]);
            let values = match view.dtype() {
                safetensors::Dtype::F32 => {
                    view.data().chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()).into()).collect()
                }
                safetensors::Dtype::F16 => pairs().map(|bytes| f16::from_le_bytes(bytes).to_f64()).collect(),
                safetensors::Dtype::BF16 => pairs().map(|bytes| bf16::from_le_bytes(bytes).to_f64()).collect(),
                other => panic!("{name} is {other}"),
            };
            assert_eq!((view.shape()[0], view.shape()[1], view.shape()[3]), (LAYERS, HEADS, DIM));
            (name.to_owned(), Rows { tokens: view.shape()[2], values })
        };
        let tensors = file.iter().map(read).collect();
        Self { factor, cases: cases.as_array().unwrap().iter().map(Case::new).collect(), tensors }
    }

    /// K or V of what goes in, or of what is expected of a case.
    fn rows(&self, dtype: Dtype, case: &str, part: usize) -> &Rows {
        let dtype = match dtype {
            Dtype::F32 => "f32",
            Dtype::F16 => "f16",
            Dtype::Bf16 => "bf16",
        };
        let name = [dtype, case, ["k", "v"][part]].into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>();
        &self.tensors[&name.join(".")]
    }

    /// Runs a case through the plugin; the first row that is not what PyTorch gives.
    fn check(&self, engine: &mut Engine, case: &Case) -> Result<(), String> {
        let dtype = engine.shape.dtype;
        engine.announce(case.tokens, &case.segments);
        let input = [0, 1].map(|part| self.rows(dtype, "", part));
        engine.append(case.tokens, |tensor, head, position| {
            let row = input[tensor % 2].row(tensor / 2, head, position as usize);
            row.iter().map(|value| *value as f32).collect()
        });
        let expected = [0, 1].map(|part| self.rows(dtype, &case.name, part));
        let rows = expected[0].tokens;
        let result = if rows as u64 == case.tokens { Err(KVH_REASON_NO_GAIN) } else { Ok(()) };
        assert_eq!(engine.compress(KVHOOK_EVENT_PREFILL_DONE), result, "{:?}, {}", engine.shape, case.name);
        assert_eq!(engine.lengths, [rows as u64; LAYERS], "{}", case.name);
        for (tensor, head, row) in places(rows) {
            let found = engine.cache.get(tensor, head, row);
            let expected = expected[tensor % 2].row(tensor / 2, head, row);
            let original = |token| input[tensor % 2].row(tensor / 2, head, token) == expected;
            let kept = (0..case.tokens as usize).any(original);
            if !(if kept { found == expected } else { close(dtype, &found, expected) }) {
                return Err(format!("{}, tensor {tensor}, head {head}, row {row}: {found:?}, {expected:?}", case.name));
            }
        }
        Ok(())
    }
}

fn places(rows: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..2 * LAYERS * HEADS * rows).map(move |place| (place / rows / HEADS, place / rows % HEADS, place % rows))
}

/// The result's rounding to the cache's dtype is half a place of the number itself, 2^-11 of it in f16 with its 11 bits
/// and 2^-8 in bf16 with its 8; before it, all is f32.
fn close(dtype: Dtype, found: &[f64], expected: &[f64]) -> bool {
    let largest = expected.iter().fold(0.0, |most: f64, value| most.max(value.abs()));
    let rounding = match dtype {
        Dtype::F32 => 0.0,
        Dtype::F16 => 2f64.powi(-11),
        Dtype::Bf16 => 2f64.powi(-8),
    };
    found.iter().zip(expected).all(|(a, b)| (a - b).abs() <= SUMS * largest + rounding * b.abs())
}

/// As `kvhook convert` does.
fn convert(factor: usize, folder: &Path, change: impl FnOnce(&mut Stored<'_>)) -> [PathBuf; 2] {
    let bytes = std::fs::read(path(&format!("f{factor}-f32.pth"))).unwrap();
    let (mut stored, _) = state_dict::read(pytorch::read(&bytes).unwrap(), &Choice::default()).unwrap();
    change(&mut stored);
    let files = [v1::write(&stored, None).unwrap(), v2::write(&stored).unwrap()];
    let names = ["weights.bin", "weights.safetensors"].map(|name| folder.join(name));
    for (name, file) in names.iter().zip(files) {
        std::fs::write(name, file).unwrap();
    }
    names
}

fn engine(
    (dtype, block_size, ranks): (Dtype, usize, usize),
    weights: &Path,
    min_groups: u64,
    image_rule: &str,
) -> Engine {
    let shape =
        Shape { layers: LAYERS, heads: HEADS, dim: DIM, capacity: 32, dtype, block_size, ranks, ..super::SHAPE };
    let weights = weights.display();
    let config =
        format!("weights={weights},positions=logical,sinks=0,recent=0,min_groups={min_groups},image_rule={image_rule}");
    Engine::new(shape, &config).unwrap()
}

#[test]
fn every_case_in_every_dtype_layout_and_number_of_ranks() {
    let mut checked = 0;
    for factor in [2, 3, 5] {
        let goldens = Goldens::read(factor);
        let folder = tempfile::tempdir().unwrap();
        for weights in convert(factor, folder.path(), |_| {}) {
            for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
                // Small blocks: a commit that frees no whole block is not worth it, says the host.
                for (block_size, ranks) in [(0, 1), (0, 3), (2, 1), (2, 3)] {
                    for (min_groups, rule) in [(1, "segments"), (1, "prefix"), (2, "segments"), (2, "prefix")] {
                        let fits = |case: &&Case| case.min_groups == min_groups && case.image_rules().contains(&rule);
                        let mut engine = engine((dtype, block_size, ranks), &weights, min_groups, rule);
                        for case in goldens.cases.iter().filter(fits) {
                            goldens.check(&mut engine, case).unwrap();
                            checked += 1;
                        }
                    }
                }
            }
        }
        let names: Vec<_> = goldens.cases.iter().map(|case| case.name.as_str()).collect();
        for remainder in 0..goldens.factor {
            assert!(names.contains(&format!("remainder{remainder}").as_str()));
        }
        for name in ["short", "all_image", "image_prefix", "image_in_the_middle"] {
            assert!(names.contains(&name));
        }
    }
    assert!(checked > 1_000, "{checked}");
}

#[test]
fn one_wrong_number_in_any_tensor_is_noticed() {
    let goldens = Goldens::read(2);
    let case = goldens.cases.iter().find(|case| case.name == "image_prefix").unwrap();
    let noticed = |dtype, mlp: usize, matrix: usize, bias: bool, number: usize| {
        let folder = tempfile::tempdir().unwrap();
        let [_, weights] = convert(2, folder.path(), |stored| {
            let linear = &mut stored.layers[1][mlp][matrix];
            let values = if bias { linear.bias.as_mut().unwrap() } else { &mut linear.weight };
            let number = &mut values.to_mut()[4 * number..4 * number + 4];
            let value = f32::from_le_bytes((&*number).try_into().unwrap());
            number.copy_from_slice(&(value + 0.5).to_le_bytes());
        });
        goldens.check(&mut engine((dtype, 0, 1), &weights, case.min_groups, "segments"), case).is_err()
    };
    for dtype in [Dtype::F32, Dtype::Bf16] {
        for mlp in 0..4 {
            for (matrix, bias) in (0..3).flat_map(|matrix| [(matrix, false), (matrix, true)]) {
                // A hidden unit may be zero for all of these rows, and its numbers idle: then it is the next one's.
                let step = match matrix {
                    _ if bias => 1,
                    0 => 2 * DIM,
                    1 => DIM + 1,
                    _ => 1,
                };
                let any = (0..DIM).any(|unit| noticed(dtype, mlp, matrix, bias, unit * step));
                assert!(any, "MLP {mlp}, matrix {matrix}, bias {bias}, {dtype:?}");
            }
        }
    }
}
