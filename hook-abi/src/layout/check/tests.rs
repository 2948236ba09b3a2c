use super::*;

/// A layer view and an output struct, each with a first generation and, where asked, a made-up second one.
fn table(generations: u32, status: Status) -> Table {
    let row = |name: &str, generation: u32, fields: &[(&str, usize, usize)]| Row {
        name: name.to_owned(),
        generation,
        size: fields.iter().map(|(_, _, size)| size).sum(),
        // Any number that differs between layouts will do: the hash itself is tested elsewhere.
        fingerprint: fields
            .iter()
            .fold(u64::from(generation), |hash, (_, at, size)| hash * 31 + (at * 8 + size) as u64),
        fields: fields.iter().map(|(field, at, size)| ((*field).to_owned(), *at, *size)).collect(),
    };
    let layer = [("struct_size", 0, 8), ("layer", 8, 4), ("kind", 12, 4), ("scale", 16, 8)];
    let plan = [("struct_size", 0, 8), ("count", 8, 8), ("weights", 16, 8)];
    let mut rows = Vec::new();
    for (name, fields) in [("KvhLayer", &layer[..]), ("KvhLayerPlan", &plan[..])] {
        rows.push((row(name, 1, &fields[..fields.len() - 1]), status));
        if generations == 2 {
            rows.push((row(name, 2, fields), status));
        }
    }
    Table { rows, abi: (1, generations - 1) }
}

/// What a plugin built with `table` lists.
fn listed(table: &Table) -> Vec<PluginFingerprint> {
    let list = |(row, _): &(Row, Status)| PluginFingerprint {
        name: row.name.clone(),
        generation: row.generation,
        value: row.fingerprint,
    };
    table.rows.iter().map(list).collect()
}

fn layouts(table: &Table) -> Vec<Row> {
    table.rows.iter().map(|(row, _)| row.clone()).collect()
}

#[test]
fn released_generations_work_in_both_directions() {
    let (old, new) = (table(1, Status::Released), table(2, Status::Released));
    check(&new, old.abi, &listed(&old), &[]).expect("old plugin on new host");
    check(&old, new.abi, &listed(&new), &[]).expect("new plugin on old host");
    check(&new, new.abi, &listed(&new), &[]).expect("new plugin on new host");
}

#[test]
fn a_draft_needs_an_exact_match() {
    let (old, new) = (table(1, Status::Draft), table(2, Status::Draft));
    check(&old, old.abi, &listed(&old), &[]).expect("the same draft");
    let newer = check(&old, new.abi, &listed(&new), &[]).unwrap_err();
    assert!(matches!(&newer, LayoutMismatch::NewerThanDraft { name, newest: 1, found: 2, .. } if name == "KvhLayer"));
    let older = check(&new, old.abi, &listed(&old), &[]).unwrap_err();
    assert!(older.to_string().contains("generations 1 of KvhLayer, the host needs one of 2;"), "{older}");
}

#[test]
fn a_missing_struct_is_refused() {
    let host = table(1, Status::Released);
    let mut plugin = listed(&host);
    plugin.retain(|row| row.name != "KvhLayerPlan");
    let error = check(&host, (1, 0), &plugin, &[]).unwrap_err();
    assert!(matches!(&error, LayoutMismatch::Missing { name, .. } if name == "KvhLayerPlan"));
}

#[test]
fn a_later_generation_alone_is_refused() {
    let host = table(1, Status::Released);
    let mut plugin = listed(&table(2, Status::Released));
    plugin.retain(|row| row.generation == 2 || row.name != "KvhLayer");
    let error = check(&host, (1, 1), &plugin, &[]).unwrap_err();
    assert!(error.to_string().contains("generations 2 of KvhLayer, the host needs one of 1;"), "{error}");
}

#[test]
fn a_field_that_moved_is_named() {
    let host = table(1, Status::Released);
    let mut theirs = table(1, Status::Released);
    theirs.rows[0].0.fields[2] = ("kind".to_owned(), 16, 4);
    theirs.rows[0].0.fingerprint ^= 1;
    let text = check(&host, (1, 0), &listed(&theirs), &layouts(&theirs)).unwrap_err().to_string();
    for part in ["KvhLayer", "generation 1", "`kind` at byte 16", "at byte 12", "rebuild", "1.0"] {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
    let without = check(&host, (1, 0), &listed(&theirs), &[]).unwrap_err().to_string();
    assert!(without.contains("fingerprint 0x"), "{without}");
}

#[test]
fn this_build_matches_itself() {
    let table = Table::current();
    assert_eq!(table.rows.len(), crate::layout::ROW_COUNT);
    check(&table, table.abi, &listed(&table), &layouts(&table)).unwrap();
}
