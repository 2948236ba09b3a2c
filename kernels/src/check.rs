//! Checking the indices of a selection before anything moves.

use crate::error::KernelError;

/// The token indices that a selection keeps in one layer, for each KV head.
///
/// Head `h` keeps `data[h * stride_head ..][.. count]`; a `stride_head` of 0 means that all heads share one list.
#[derive(Debug, Clone, Copy)]
pub struct Indices<'a> {
    /// Token indices.
    pub data: &'a [u32],
    /// Distance between two heads' lists, in elements; 0: shared by all heads.
    pub stride_head: usize,
    /// Indices in each list.
    pub count: usize,
}

impl<'a> Indices<'a> {
    /// One list that all heads share.
    pub fn shared(data: &'a [u32]) -> Self {
        Self { data, stride_head: 0, count: data.len() }
    }

    /// Lists of `count` indices, one after the other, one for each head.
    pub fn per_head(data: &'a [u32], count: usize) -> Self {
        Self { data, stride_head: count, count }
    }

    /// The list of one head.
    ///
    /// # Errors
    /// [`IndexFault::BufferTooShort`] when `data` ends before the list does.
    pub fn of(&self, head: usize) -> Result<&'a [u32], BadIndex> {
        let start = head.saturating_mul(self.stride_head);
        let end = start.saturating_add(self.count);
        self.data.get(start..end).ok_or(BadIndex {
            head,
            place: self.data.len().saturating_sub(start).min(self.count),
            value: 0,
            fault: IndexFault::BufferTooShort { needed: end, found: self.data.len() },
        })
    }
}

/// The first index of a selection that is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("indices, head {head}, place {place}: {}", fault.describe(*value))]
pub struct BadIndex {
    /// KV head.
    pub head: usize,
    /// Place in that head's list.
    pub place: usize,
    /// The value found there (0 where the buffer ends before the place).
    pub value: u32,
    /// What is wrong with it.
    pub fault: IndexFault,
}

/// What is wrong with an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IndexFault {
    /// Not below the number of rows.
    OutOfRange {
        /// The number of rows.
        length: usize,
    },
    /// Lower than the one before it.
    Descending {
        /// The one before it.
        previous: u32,
    },
    /// Equal to the one before it.
    Repeated,
    /// The buffer ends before the list does.
    BufferTooShort {
        /// Elements needed.
        needed: usize,
        /// Elements found.
        found: usize,
    },
}

impl IndexFault {
    fn describe(self, value: u32) -> String {
        match self {
            Self::OutOfRange { length } => {
                format!("token {value} is out of range, expected less than {length}")
            }
            Self::Descending { previous } => {
                format!("token {value} follows token {previous}, expected ascending order")
            }
            Self::Repeated => format!("token {value} is repeated, expected each token once"),
            Self::BufferTooShort { needed, found } => {
                format!("the buffer holds {found} indices, expected at least {needed}")
            }
        }
    }
}

/// Checks the lists of `heads` heads: each in range, strictly ascending, wholly inside the buffer.
///
/// Floor: reads 4 bytes for each index.
///
/// # Errors
/// The first index that is wrong, by head and place.
pub fn check_indices(indices: &Indices<'_>, heads: usize, length: usize) -> Result<(), BadIndex> {
    let lists = if indices.stride_head == 0 { heads.min(1) } else { heads };
    for head in 0..lists {
        check_list(indices.of(head)?, head, length)?;
    }
    Ok(())
}

fn check_list(list: &[u32], head: usize, length: usize) -> Result<(), BadIndex> {
    // No early exit: this form is vectorised, and good lists are the rule.
    let ascending = list.windows(2).fold(true, |good, pair| good & (pair[0] < pair[1]));
    let in_range = list.last().is_none_or(|&last| (last as usize) < length);
    if ascending && in_range {
        return Ok(());
    }
    let mut previous = None;
    for (place, &value) in list.iter().enumerate() {
        let fault = match previous {
            Some(before) if value == before => Some(IndexFault::Repeated),
            Some(before) if value < before => Some(IndexFault::Descending { previous: before }),
            _ if value as usize >= length => Some(IndexFault::OutOfRange { length }),
            _ => None,
        };
        if let Some(fault) = fault {
            return Err(BadIndex { head, place, value, fault });
        }
        previous = Some(value);
    }
    Ok(())
}

/// Refuses a slice whose length is not the one that the other arguments ask for.
pub(crate) fn check_len(what: &'static str, found: usize, expected: usize) -> Result<(), KernelError> {
    if found == expected { Ok(()) } else { Err(KernelError::SliceLength { what, found, expected }) }
}
