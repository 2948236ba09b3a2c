//! A pickle machine for what `torch.save` writes: it builds plain values and tensors, and calls nothing.
//!
//! Python's `pickletools` has the opcodes. Values are nodes of one list and refer to each other by index, so that a value
//! that is named twice is one value, a cycle leaks nothing, and memory is bounded by the length of the pickle.

use std::collections::HashMap;

use crate::WeightsError;

/// A value. Lists and tuples refer to other nodes.
#[derive(Debug, Clone, PartialEq)]
pub enum Node {
    /// A number without a fraction.
    Int(i64),
    /// Text.
    Text(String),
    /// A tuple.
    Tuple(Vec<usize>),
    /// A dict or an OrderedDict, in its order.
    Dict(Vec<(usize, usize)>),
    /// A class or function, by module and name.
    Global(String),
    /// Bytes of numbers in another entry of the archive.
    Storage(StorageNode),
    /// A tensor.
    Tensor(TensorNode),
    /// A value that no tensor needs: lists, floats, sets, objects of other classes.
    Other,
}

/// Where numbers are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StorageNode {
    /// Class of the storage, which tells the element type, such as `HalfStorage`.
    pub class: String,
    /// Entry of the archive.
    pub key: String,
}

/// A tensor as a view of a storage, counted in elements.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorNode {
    /// Where its numbers are.
    pub storage: StorageNode,
    /// Its first element.
    pub offset: usize,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Elements from one index to the next, for each dimension.
    pub strides: Vec<usize>,
}

/// Most dimensions of a tensor.
const MAX_DIMENSIONS: usize = 8;

/// The machine's state.
#[derive(Debug, Default)]
pub struct Machine {
    nodes: Vec<Node>,
    stack: Vec<usize>,
    /// Heights of the stack at the open marks.
    marks: Vec<usize>,
    memo: HashMap<u64, usize>,
}

/// Why an instruction failed, in words.
type Reason = String;

impl Machine {
    /// A value.
    pub fn node(&self, index: usize) -> &Node {
        self.nodes.get(index).unwrap_or(&Node::Other)
    }

    /// Follows a pickle to its end; gives the value that it leaves.
    ///
    /// # Errors
    /// [`WeightsError::Pickle`].
    pub fn run(&mut self, bytes: &[u8]) -> Result<usize, WeightsError> {
        let mut input = Input { bytes, offset: 0 };
        loop {
            let offset = input.offset;
            let stopped = input.byte().and_then(|opcode| match opcode {
                b'.' => self.pop().map(Some),
                _ => self.step(opcode, &mut input).map(|()| None),
            });
            match stopped {
                Ok(Some(value)) => return Ok(value),
                Ok(None) => {}
                Err(reason) => return Err(WeightsError::Pickle { offset, reason }),
            }
        }
    }

    fn step(&mut self, opcode: u8, input: &mut Input<'_>) -> Result<(), Reason> {
        match opcode {
            // PROTO, FRAME: nothing to do.
            0x80 => drop(input.byte()?),
            0x95 => drop(input.take(8)?),
            // MARK, POP, POP_MARK, DUP
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_to_mark()?),
            b'2' => {
                let top = self.top()?;
                self.stack.push(top);
            }
            // NONE, NEWTRUE, NEWFALSE, EMPTY_LIST, EMPTY_SET
            b'N' | 0x88 | 0x89 | b']' | 0x8f => self.push(Node::Other),
            // BININT, BININT1, BININT2, LONG1
            b'J' => {
                let word = input.take(4)?;
                self.push(Node::Int(i64::from(i32::from_le_bytes([word[0], word[1], word[2], word[3]]))));
            }
            b'K' => {
                let byte = input.byte()?;
                self.push(Node::Int(i64::from(byte)));
            }
            b'M' => {
                let number = input.length(2)?;
                self.push(Node::Int(number as i64));
            }
            0x8a => {
                let length = usize::from(input.byte()?);
                let node = long(input.take(length)?);
                self.push(node);
            }
            // BINFLOAT
            b'G' => {
                input.take(8)?;
                self.push(Node::Other);
            }
            // BINUNICODE, SHORT_BINUNICODE, BINUNICODE8, BINSTRING, SHORT_BINSTRING
            b'X' | b'T' => self.push_text(input, 4)?,
            0x8c | b'U' => self.push_text(input, 1)?,
            0x8d => self.push_text(input, 8)?,
            // BINBYTES, SHORT_BINBYTES
            b'B' | b'C' => {
                let length = input.length(if opcode == b'B' { 4 } else { 1 })?;
                input.take(length)?;
                self.push(Node::Other);
            }
            // TUPLE, EMPTY_TUPLE, TUPLE1, TUPLE2, TUPLE3
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Node::Tuple(items));
            }
            b')' => self.push(Node::Tuple(Vec::new())),
            0x85..=0x87 => {
                let items = self.pop_many(usize::from(opcode - 0x84))?;
                self.push(Node::Tuple(items));
            }
            b'}' => self.push(Node::Dict(Vec::new())),
            // SETITEM, SETITEMS
            b's' => {
                let items = self.pop_many(2)?;
                self.set_items(&items)?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set_items(&items)?;
            }
            // APPEND, APPENDS, ADDITEMS: into a list or set, which is not looked at.
            b'a' => drop(self.pop()?),
            b'e' | 0x90 => drop(self.pop_to_mark()?),
            // GLOBAL, STACK_GLOBAL
            b'c' => {
                let (module, name) = (input.line()?, input.line()?);
                self.push(Node::Global(format!("{module}.{name}")));
            }
            0x93 => {
                let parts = self.pop_many(2)?;
                let name = parts.iter().map(|part| self.text(*part)).collect::<Result<Vec<_>, _>>()?.join(".");
                self.push(Node::Global(name));
            }
            // BINPUT, LONG_BINPUT, MEMOIZE, BINGET, LONG_BINGET
            b'q' => self.put(input.length(1)? as u64)?,
            b'r' => self.put(input.length(4)? as u64)?,
            0x94 => self.put(self.memo.len() as u64)?,
            b'h' => self.get(input.length(1)? as u64)?,
            b'j' => self.get(input.length(4)? as u64)?,
            // REDUCE, NEWOBJ
            b'R' | 0x81 => {
                let arguments = self.pop()?;
                let callable = self.pop()?;
                self.reduce(callable, arguments)?;
            }
            // BUILD: attributes of an object, such as `_metadata` of a state dict.
            b'b' => drop(self.pop()?),
            // BINPERSID
            b'Q' => {
                let id = self.pop()?;
                let storage = self.storage(id)?;
                self.push(Node::Storage(storage));
            }
            other => return Err(format!("opcode {other:#04x}, which torch.save does not write")),
        }
        Ok(())
    }

    fn push(&mut self, node: Node) {
        self.stack.push(self.nodes.len());
        self.nodes.push(node);
    }

    fn push_text(&mut self, input: &mut Input<'_>, width: usize) -> Result<(), Reason> {
        let length = input.length(width)?;
        let text = std::str::from_utf8(input.take(length)?).map_err(|_| "text that is not UTF-8")?;
        self.push(Node::Text(text.into()));
        Ok(())
    }

    /// Values above the last mark only: no instruction reaches below it.
    fn pop(&mut self) -> Result<usize, Reason> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err("the stack is empty".into());
        }
        self.stack.pop().ok_or_else(|| "the stack is empty".into())
    }

    fn pop_many(&mut self, count: usize) -> Result<Vec<usize>, Reason> {
        let mut items = (0..count).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
        items.reverse();
        Ok(items)
    }

    fn pop_to_mark(&mut self) -> Result<Vec<usize>, Reason> {
        let mark = self.marks.pop().ok_or("no mark on the stack")?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn top(&self) -> Result<usize, Reason> {
        self.stack.last().copied().ok_or_else(|| "the stack is empty".into())
    }

    fn put(&mut self, key: u64) -> Result<(), Reason> {
        let top = self.top()?;
        self.memo.insert(key, top);
        Ok(())
    }

    fn get(&mut self, key: u64) -> Result<(), Reason> {
        let value = *self.memo.get(&key).ok_or_else(|| format!("nothing is remembered as {key}"))?;
        self.stack.push(value);
        Ok(())
    }

    fn set_items(&mut self, items: &[usize]) -> Result<(), Reason> {
        let target = self.top()?;
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return Err("a key without a value".into());
        }
        // Of an object of another class, items are not looked at.
        if let Some(Node::Dict(dict)) = self.nodes.get_mut(target) {
            dict.extend(pairs.iter().map(|[key, value]| (*key, *value)));
        }
        Ok(())
    }

    /// What calling would give, for the few functions of which a state dict is made.
    fn reduce(&mut self, callable: usize, arguments: usize) -> Result<(), Reason> {
        let name = match self.node(callable) {
            Node::Global(name) => name.clone(),
            _ => String::new(),
        };
        match name.as_str() {
            "collections.OrderedDict" | "collections.defaultdict" => self.push(Node::Dict(Vec::new())),
            "torch._utils._rebuild_tensor_v2" => {
                let tensor = self.tensor(arguments)?;
                self.push(Node::Tensor(tensor));
            }
            "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state" => {
                let inner = *self.tuple(arguments)?.first().ok_or("a parameter without a tensor")?;
                self.stack.push(inner);
            }
            "torch._tensor._rebuild_from_type_v2" => {
                let [function, _, inner, ..] = *self.tuple(arguments)? else {
                    return Err("a tensor of another type without its parts".into());
                };
                // One level only, so that a pickle cannot make it call itself.
                match self.node(function) {
                    Node::Global(name) if name == "torch._utils._rebuild_tensor_v2" => self.reduce(function, inner)?,
                    _ => self.push(Node::Other),
                }
            }
            _ => self.push(Node::Other),
        }
        Ok(())
    }

    /// A tensor by the arguments of its function: storage, offset, shape, strides.
    fn tensor(&self, arguments: usize) -> Result<TensorNode, Reason> {
        let [storage, offset, shape, strides, ..] = *self.tuple(arguments)? else {
            return Err("a tensor without its parts".into());
        };
        let Node::Storage(storage) = self.node(storage) else {
            return Err("a tensor without a storage".into());
        };
        let sizes = |node: usize| match self.tuple(node)? {
            items if items.len() > MAX_DIMENSIONS => Err(format!("a tensor of {} dimensions", items.len())),
            items => items.iter().map(|item| self.size(*item)).collect::<Result<Vec<_>, _>>(),
        };
        let (offset, shape, strides) = (self.size(offset)?, sizes(shape)?, sizes(strides)?);
        if shape.len() != strides.len() {
            return Err(format!("a tensor of shape {shape:?} with strides {strides:?}"));
        }
        Ok(TensorNode { storage: storage.clone(), offset, shape, strides })
    }

    /// A storage by its persistent id: `("storage", class, key, device, elements)`.
    fn storage(&self, id: usize) -> Result<StorageNode, Reason> {
        let [tag, class, key, ..] = *self.tuple(id)? else {
            return Err("a storage without its parts".into());
        };
        match (self.node(tag), self.node(class), self.node(key)) {
            (Node::Text(tag), Node::Global(class), Node::Text(key)) if tag == "storage" => {
                let class = class.rsplit('.').next().unwrap_or_default().to_owned();
                Ok(StorageNode { class, key: key.clone() })
            }
            _ => Err("a reference to something else than a storage".into()),
        }
    }

    fn tuple(&self, node: usize) -> Result<&[usize], Reason> {
        match self.node(node) {
            Node::Tuple(items) => Ok(items),
            _ => Err("expected a tuple".into()),
        }
    }

    fn text(&self, node: usize) -> Result<&str, Reason> {
        match self.node(node) {
            Node::Text(text) => Ok(text),
            _ => Err("expected text".into()),
        }
    }

    fn size(&self, node: usize) -> Result<usize, Reason> {
        match self.node(node) {
            Node::Int(number) => usize::try_from(*number).map_err(|_| format!("a size of {number}")),
            _ => Err("expected a number".into()),
        }
    }
}

/// A number in two's complement, as short as it could be written; a longer one than 64 bits is no size of anything.
fn long(bytes: &[u8]) -> Node {
    if bytes.len() > 8 {
        return Node::Other;
    }
    let sign = if bytes.last().is_some_and(|byte| byte & 0x80 != 0) { 0xff } else { 0 };
    let mut word = [sign; 8];
    word[..bytes.len()].copy_from_slice(bytes);
    Node::Int(i64::from_le_bytes(word))
}

struct Input<'a> {
    bytes: &'a [u8],
    offset: usize,
}

impl<'a> Input<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Reason> {
        let taken = self.offset.checked_add(count).and_then(|end| self.bytes.get(self.offset..end));
        let taken = taken.ok_or("the pickle ends too early")?;
        self.offset += count;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, Reason> {
        Ok(self.take(1)?[0])
    }

    /// A number of `width` bytes, at most 8.
    fn length(&mut self, width: usize) -> Result<usize, Reason> {
        let mut word = [0; 8];
        word[..width].copy_from_slice(self.take(width)?);
        usize::try_from(u64::from_le_bytes(word)).map_err(|_| "a length beyond the machine's".into())
    }

    fn line(&mut self) -> Result<&'a str, Reason> {
        let rest = &self.bytes[self.offset..];
        let end = rest.iter().position(|byte| *byte == b'\n').ok_or("the pickle ends too early")?;
        self.offset += end + 1;
        std::str::from_utf8(&rest[..end]).map_err(|_| "a name that is not UTF-8".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(bytes: &[u8]) -> Result<Node, WeightsError> {
        let mut machine = Machine::default();
        let root = machine.run(bytes)?;
        Ok(machine.node(root).clone())
    }

    #[test]
    fn numbers() {
        for (bytes, expected) in [
            (b"K\x07.".as_slice(), 7),
            (b"M\x01\x02.", 0x201),
            (b"J\xfe\xff\xff\xff.", -2),
            (b"\x8a\x02\xff\x00.", 255),
            (b"\x8a\x01\xff.", -1),
            (b"\x8a\x00.", 0),
        ] {
            assert_eq!(run(bytes).unwrap(), Node::Int(expected), "{bytes:?}");
        }
    }

    #[test]
    fn a_value_that_is_named_twice_is_one() {
        // {} put as 0; get 0; key, value; setitem: the first dict has the item, too.
        let mut machine = Machine::default();
        let root = machine.run(b"}q\0h\0U\x01aK\x01s0.").unwrap();
        assert!(matches!(machine.node(root), Node::Dict(items) if items.len() == 1));
    }

    #[test]
    fn what_is_wrong_is_located() {
        for (bytes, at, words) in [
            (b"K\x01K".as_slice(), 2, "ends too early"),
            (b"}U\x01as", 4, "stack is empty"),
            (b"h\x05.", 0, "remembered as 5"),
            (b"K\x01\xfe", 2, "0xfe"),
            (b"K\x01Q.", 2, "tuple"),
            (b"t", 0, "no mark"),
            (b"X\xff\xff\xff\xffa", 0, "ends too early"),
        ] {
            match run(bytes) {
                Err(WeightsError::Pickle { offset, reason }) => {
                    assert!(offset == at && reason.contains(words), "{bytes:?}: {offset} {reason}");
                }
                other => panic!("{bytes:?}: {other:?}"),
            }
        }
    }

    #[test]
    fn nothing_is_called() {
        assert_eq!(run(b"cos\nsystem\nU\x04true\x85R.").unwrap(), Node::Other);
    }
}
