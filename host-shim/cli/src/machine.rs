//! What a report says about the machine and the time.

use std::time::SystemTime;

use crate::results::Machine;

/// This machine, with the device on which the model ran, if that is not the processor; what the system does not tell is left
/// empty or zero.
pub fn this_machine(accelerator: Option<&str>) -> Machine {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let memory_kib = value(&read("/proc/meminfo"), "MemTotal")
        .and_then(|text| text.split_whitespace().next().and_then(|number| number.parse::<u64>().ok()));
    Machine {
        cpu: value(&read("/proc/cpuinfo"), "model name").unwrap_or_default(),
        cores: std::thread::available_parallelism().map_or(0, usize::from),
        accelerator: accelerator.unwrap_or_default().to_owned(),
        memory_bytes: memory_kib.unwrap_or(0) * 1024,
        system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
    }
}

/// Now, RFC 3339 in UTC, to the second.
pub fn now() -> String {
    humantime::format_rfc3339_seconds(SystemTime::now()).to_string()
}

/// The value of the first line `name : value`.
fn value(text: &str, name: &str) -> Option<String> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map(|(_, value)| value.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_proc_files() {
        assert_eq!(value("a\t: 1\nmodel name\t: CPU: fast\n", "model name").as_deref(), Some("CPU: fast"));
        assert_eq!(value("MemTotal:  12 kB", "MemFree"), None);
    }
}
