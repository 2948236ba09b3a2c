//! `abi/v1.toml`: the layouts of the contract's structs, as reviewers see them.

use std::fmt::Write;
use std::path::Path;
use std::{fs, io};

use kvhook_abi::layout::{Row, Status, Table};
use serde::Deserialize;

use crate::CodegenError;

/// The table, from the repository's root.
pub const PATH: &str = "hook-abi/abi/v1.toml";

const HEAD: &str = "\
# Layouts of every generation of every struct of ABI major 1, written by kvhook-codegen.
# A row is a draft until its first release; a released row never changes (kvhook-codegen refuses).
# Fields: name, offset, size, in bytes. Fingerprint: FNV-1a 64, see StructLayout::fingerprint.
";

#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    row: Vec<TableRow>,
}

#[derive(Deserialize)]
struct TableRow {
    status: String,
    #[serde(flatten)]
    row: Row,
}

/// The table's text for the code as it is, after checking the released rows of the file at `path`.
///
/// # Errors
/// [`CodegenError::ReleasedChanged`]; [`CodegenError::Table`] or [`CodegenError::File`] when the file cannot be read.
pub fn generate(path: &Path) -> Result<String, CodegenError> {
    let table = Table::current();
    match fs::read_to_string(path) {
        Ok(text) => check_released(&text, path, &table)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(CodegenError::File { path: path.to_owned(), source }),
    }
    let mut out = String::from(HEAD);
    for (row, status) in &table.rows {
        let status = match status {
            Status::Draft => "draft",
            Status::Released => "released",
        };
        let fields: Vec<String> =
            row.fields.iter().map(|(name, offset, size)| format!("    [\"{name}\", {offset}, {size}],\n")).collect();
        // Writing to a string cannot fail.
        let _ = write!(
            out,
            "\n[[row]]\nstruct = \"{}\"\ngeneration = {}\nstatus = \"{status}\"\nsize = {}\nfingerprint = \"{:#018x}\"\n\
             fields = [\n{}]\n",
            row.name,
            row.generation,
            row.size,
            row.fingerprint,
            fields.concat()
        );
    }
    Ok(out)
}

/// Refuses when a released row of the checked-in table is not in the code, released and the same.
fn check_released(text: &str, path: &Path, table: &Table) -> Result<(), CodegenError> {
    let document: Document = toml::from_str(text)
        .map_err(|source| CodegenError::Table { path: path.to_owned(), source: Box::new(source) })?;
    for TableRow { row, .. } in document.row.iter().filter(|row| row.status == "released") {
        let changed = |problem: String| {
            Err(CodegenError::ReleasedChanged { name: row.name.clone(), generation: row.generation, problem })
        };
        let same = |(code, _): &&(Row, Status)| code.name == row.name && code.generation == row.generation;
        match table.rows.iter().find(same) {
            None => return changed("the code has no such struct or generation".to_owned()),
            Some((_, Status::Draft)) => return changed("the code's RELEASED does not list it".to_owned()),
            Some((code, Status::Released)) if code != row => {
                let field = code.fields.iter().zip(&row.fields).find(|(code, row)| code != row);
                return changed(format!(
                    "the code has size {} for {}, first other field: {field:?}",
                    code.size, row.size
                ));
            }
            Some(_) => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn released(table: &mut Table, name: &str) {
        table.rows.iter_mut().filter(|(row, _)| row.name == name).for_each(|(_, status)| *status = Status::Released);
    }

    const ROW: &str = "[[row]]\nstruct = \"KvhRange\"\ngeneration = 1\nstatus = \"released\"\nsize = 16\n\
                       fingerprint = \"FINGERPRINT\"\nfields = [[\"start\", 0, 8], [\"length\", 8, 8]]\n";

    #[test]
    fn a_released_row_must_stay() {
        let mut table = Table::current();
        released(&mut table, "KvhRange");
        let range = table.rows.iter().find(|(row, _)| row.name == "KvhRange").unwrap();
        let good = ROW.replace("FINGERPRINT", &format!("{:#018x}", range.0.fingerprint));
        let check = |text: &str, table: &Table| check_released(text, Path::new("v1.toml"), table);
        check(&good, &table).expect("the same row");
        let moved = good.replace("8, 8", "12, 4");
        assert!(matches!(check(&moved, &table), Err(CodegenError::ReleasedChanged { .. })));
        let gone = good.replace("KvhRange", "KvhGone");
        assert!(matches!(check(&gone, &table), Err(CodegenError::ReleasedChanged { .. })));
        assert!(matches!(check(&good, &Table::current()), Err(CodegenError::ReleasedChanged { .. })));
        assert!(matches!(check("[[row]", &table), Err(CodegenError::Table { .. })));
        check(&moved.replace("released", "draft"), &table).expect("a draft may change");
    }
}
