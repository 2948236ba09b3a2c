//! Reads the lines of a record.

use std::io::{self, BufRead, Read};

use super::line::{self, Content, Line, MAX_LINE};
use super::{Problem, Record, Setting};

/// Reads a record to its end. Wrong lines are told in [`Record::problems`].
///
/// # Errors
/// Those of the reader.
pub fn read(mut reader: impl BufRead) -> io::Result<Record> {
    let mut record = Record::default();
    let mut bytes = Vec::new();
    for number in 1.. {
        bytes.clear();
        if reader.by_ref().take(MAX_LINE as u64 + 1).read_until(b'\n', &mut bytes)? == 0 {
            break;
        }
        let ended = bytes.last() == Some(&b'\n');
        if !ended && bytes.len() > MAX_LINE {
            skip_line(&mut reader)?;
            record.lines += 1;
            record.pass_over(number, format!("it has more than {MAX_LINE} bytes"));
            continue;
        }
        let content = bytes.trim_ascii();
        let content = if number == 1 { content.strip_prefix(b"\xef\xbb\xbf").unwrap_or(content) } else { content };
        if content.is_empty() {
            continue;
        }
        record.lines += 1;
        match line::parse(content) {
            Ok(line) => record.add(line),
            Err(_) if !ended => record.cut_off = true,
            Err(what) => record.pass_over(number, what),
        }
    }
    Ok(record)
}

fn skip_line(reader: &mut impl BufRead) -> io::Result<()> {
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Ok(());
        }
        let end = buffer.iter().position(|&byte| byte == b'\n');
        let length = end.map_or(buffer.len(), |end| end + 1);
        reader.consume(length);
        if end.is_some() {
            return Ok(());
        }
    }
}

impl Record {
    fn pass_over(&mut self, line: usize, what: String) {
        self.passed_over += 1;
        if self.problems.len() < Self::MOST_PROBLEMS {
            self.problems.push(Problem { line, what });
        }
    }

    fn add(&mut self, line: Line) {
        if line.content == Content::Other {
            self.other_kinds += 1;
            return;
        }
        let same = |setting: &Setting| setting.engine == line.engine && setting.model == line.model;
        let place = self.settings.iter().position(same).unwrap_or_else(|| {
            let (engine, model) = (line.engine.clone(), line.model.clone());
            self.settings.push(Setting { engine, model, ..Setting::default() });
            self.settings.len() - 1
        });
        let setting = &mut self.settings[place];
        match line.content {
            Content::Figures { run, arms } => setting.history.add(line.at, run, arms),
            Content::Probe { prompt, arm, tokens, kl, kept } => setting.probes.add(prompt, arm, tokens, kl, kept),
            Content::Other => {}
        }
    }
}
