//! A version 1 file written from the table of the format, without the crate's writer.

#![allow(dead_code, reason = "each test file uses a part")]

/// Fields of the header, changed one at a time by tests.
#[derive(Clone)]
pub struct V1 {
    pub magic: [u8; 4],
    pub version: u32,
    pub dtype: u16,
    pub reserved: u16,
    pub layers: u32,
    pub heads: u32,
    pub head_dim: u32,
    pub hidden_size: u32,
    pub factor: u32,
    pub min_seq_len: u32,
    pub weight_count: u32,
    pub metadata_size: u32,
    pub metadata: Vec<u8>,
    /// Rows, columns, has_bias, then all elements of matrix and bias as f32 would have them.
    pub matrices: Vec<(u32, u32, u32, Vec<f32>)>,
}

pub const LAYERS: usize = 2;
pub const DIM: usize = 4;
pub const FACTOR: usize = 3;

/// f32, two layers, text and image, each with biases but the last matrix. Element `i` of matrix `m` is `m + i / 256`.
pub fn sample() -> V1 {
    let mut matrices = Vec::new();
    for number in 0..LAYERS * 12 {
        let (rows, cols) = (DIM, if number % 3 == 0 { FACTOR * DIM } else { DIM });
        let has_bias = u32::from(number % 3 != 2);
        let count = rows * cols + if has_bias == 1 { rows } else { 0 };
        let numbers = (0..count).map(|i| number as f32 + i as f32 / 256.0).collect();
        matrices.push((rows as u32, cols as u32, has_bias, numbers));
    }
    V1 {
        magic: [0x4d, 0x43, 0x56, 0x4b],
        version: 1,
        dtype: 2,
        reserved: 0,
        layers: LAYERS as u32,
        heads: 0,
        head_dim: DIM as u32,
        hidden_size: (FACTOR * DIM) as u32,
        factor: FACTOR as u32,
        min_seq_len: 2,
        weight_count: 12,
        metadata_size: 5,
        metadata: b"hello".to_vec(),
        matrices,
    }
}

impl V1 {
    pub fn bytes(&self) -> Vec<u8> {
        let mut file = self.magic.to_vec();
        file.extend(self.version.to_le_bytes());
        file.extend(self.dtype.to_le_bytes());
        file.extend(self.reserved.to_le_bytes());
        for word in [
            self.layers,
            self.heads,
            self.head_dim,
            self.hidden_size,
            self.factor,
            self.min_seq_len,
            self.weight_count,
            self.metadata_size,
        ] {
            file.extend(word.to_le_bytes());
        }
        file.extend(&self.metadata);
        for (rows, cols, has_bias, numbers) in &self.matrices {
            for word in [rows, cols, has_bias] {
                file.extend(word.to_le_bytes());
            }
            for number in numbers {
                match self.dtype {
                    0 => file.extend(half::f16::from_f32(*number).to_le_bytes()),
                    1 => file.extend(half::bf16::from_f32(*number).to_le_bytes()),
                    _ => file.extend(number.to_le_bytes()),
                }
            }
        }
        file
    }
}

/// A file beside the golden script.
pub fn golden(name: &str) -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../tests/goldens/mlp_decouple").join(name)
}
