//! Scores from PyTorch (`tests/goldens/expected_attention.py`).

#![allow(dead_code, reason = "each test file uses a part")]

use std::path::Path;

use kvhook_testing::PerHead;
use safetensors::SafeTensors;

/// What a case was computed with, and its scores.
pub struct Case {
    pub name: String,
    pub base: f64,
    pub frequencies: Vec<f32>,
    pub rotary_dim: u32,
    pub pairing: String,
    pub future: u64,
    pub covariance: bool,
    pub epsilon: f64,
    /// `[tokens][q_heads][channels]`
    pub q: PerHead,
    /// `[kv_heads][tokens][channels]`
    pub k: PerHead,
    pub v: PerHead,
    /// `[kv_heads][tokens]`
    pub scores: Vec<Vec<f64>>,
}

pub fn cases() -> Vec<Case> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/expected_attention.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let listed: serde_json::Value = serde_json::from_str(&metadata.metadata().as_ref().unwrap()["cases"]).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let rows = |name: &str| -> PerHead {
        let tensor = tensors.tensor(name).unwrap();
        let shape = tensor.shape();
        let values = tensor.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
        let flat: Vec<f32> = values.collect();
        let rows = flat.chunks(shape[2]).map(<[f32]>::to_vec).collect::<Vec<_>>();
        rows.chunks(shape[1]).map(<[Vec<f32>]>::to_vec).collect()
    };
    let (q, k, v) = (rows("q"), rows("k"), rows("v"));
    let case = |listed: &serde_json::Value| {
        let number = |key: &str| listed[key].as_f64().unwrap();
        let (name, tokens) = (listed["name"].as_str().unwrap(), number("tokens") as usize);
        let first = |heads: &PerHead| heads.iter().map(|rows| rows[..tokens].to_vec()).collect();
        let scores = tensors.tensor(name).unwrap();
        let scores: Vec<f64> = scores.data().as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect();
        Case {
            name: name.into(),
            base: number("base"),
            frequencies: listed["frequencies"].as_array().unwrap().iter().map(|f| f.as_f64().unwrap() as f32).collect(),
            rotary_dim: number("rotary_dim") as u32,
            pairing: listed["pairing"].as_str().unwrap().into(),
            future: number("future") as u64,
            covariance: listed["covariance"].as_bool().unwrap(),
            epsilon: number("epsilon"),
            q: q[..tokens].iter().map(|heads| heads[..number("q_heads") as usize].to_vec()).collect(),
            k: first(&k),
            v: first(&v),
            scores: scores.chunks(tokens).map(<[f64]>::to_vec).collect(),
        }
    };
    listed.as_array().unwrap().iter().map(case).collect()
}
