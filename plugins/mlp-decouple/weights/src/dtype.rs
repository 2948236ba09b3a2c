//! Element types, and bytes as numbers.

use half::{bf16, f16};

/// Element type of the tensors in a file. Stored little endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE 754 half.
    F16,
    /// The upper half of an f32.
    Bf16,
    /// IEEE 754 single.
    F32,
}

impl Dtype {
    /// All of them, in the order of their version 1 codes.
    pub const ALL: [Self; 3] = [Self::F16, Self::Bf16, Self::F32];

    /// `f16`, `bf16` or `f32`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        }
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }

    /// The numbers in `bytes`; a part of an element at the end is left out.
    pub fn decode(self, bytes: &[u8]) -> Vec<f32> {
        let pairs = bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        match self {
            Self::F16 => pairs.map(|bits| f16::from_bits(bits).to_f32()).collect(),
            Self::Bf16 => pairs.map(|bits| bf16::from_bits(bits).to_f32()).collect(),
            Self::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        }
    }

    /// `values` as bytes, rounded to nearest.
    pub fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
            Self::Bf16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
            Self::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_bits() {
        // 1.5 and -2 as IEEE 754 has them.
        let known: [(Dtype, &[u8]); 3] = [
            (Dtype::F16, &[0x00, 0x3e, 0x00, 0xc0]),
            (Dtype::Bf16, &[0xc0, 0x3f, 0x00, 0xc0]),
            (Dtype::F32, &[0, 0, 0xc0, 0x3f, 0, 0, 0, 0xc0]),
        ];
        for (dtype, bytes) in known {
            assert_eq!(dtype.decode(bytes), [1.5, -2.0]);
            assert_eq!(dtype.encode(&[1.5, -2.0]), bytes);
        }
    }
}
