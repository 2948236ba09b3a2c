//! Commands that are not as they should be: each is refused with its error, and changes nothing.

use super::*;

/// The raw command, as bytes: what comes over a network is not always text.
fn send(engine: &Engine, command: &[u8], source: i32) -> Answer<()> {
    let command = KvhStr { data: command.as_ptr().cast(), length: command.len() };
    call(|error| unsafe { kvhook_control(engine.raw, command, source, error) })
}

/// An engine with two arms and a live sequence.
struct Serving {
    engine: Engine,
    script: Arc<Script>,
    cache: Cache,
}

impl Serving {
    fn new() -> Self {
        let script = Arc::new(Script::default());
        let engine = scripted(SMALL, &script, &[("a", 1.0), ("b", 2.0)]);
        let cache = begin_on(&engine, "a", 20);
        Self { engine, script, cache }
    }

    /// The command is refused so, nothing has changed, and no message can break a line of a log.
    #[track_caller]
    fn refuses(&self, command: &[u8], source: i32, expected: KvhookStatus) -> String {
        let (before, live) = (arms(&self.engine), self.script.live.load(SeqCst));
        let (status, message) = send(&self.engine, command, source).unwrap_err();
        assert_eq!(status, expected, "{message}");
        assert!(!message.is_empty() && message.len() < 1024);
        assert!(!message.contains(char::is_control), "{message:?}");
        assert!(self.engine.watch.log.lock().unwrap().iter().all(|(_, line)| !line.contains(char::is_control)));
        assert_eq!((arms(&self.engine), self.script.live.load(SeqCst)), (before, live));
        message
    }

    #[track_caller]
    fn refuses_changes(&self, changes: &str, expected: KvhookStatus) -> String {
        self.refuses(format!(r#"{{"changes": {changes}}}"#).as_bytes(), KVHOOK_SOURCE_OPERATOR, expected)
    }

    /// What was there goes on.
    fn end(mut self) {
        let ticket = self.engine.plan(&mut self.cache, DONE, false).unwrap();
        self.engine.commit(&mut self.cache, &self.script, ticket);
        self.engine.free(self.cache.uid, KVH_FREE_FINISHED).unwrap();
    }
}

#[test]
fn what_is_no_command() {
    let serving = Serving::new();
    let operator = KVHOOK_SOURCE_OPERATOR;
    let spec = |command: &[u8]| serving.refuses(command, operator, KVHOOK_ERR_SPEC);
    for command in [
        &b""[..],
        b"{",
        b"null",
        b"{\"changes\": [{\"weights\": {\"a\": 1}}]} trailing",
        b"{\"changes\": [{\"weights\": {\"a\": NaN}}]}",
        b"{\"changes\": [{\"weights\": {\"a\": 1e999}}]}",
        b"{\"changes\": [{\"weights\": {\"a\": Infinity}}]}",
        b"{\"changes\": [{\"state\": {\"a\": \"\\ud800\"}}]}",
        b"{\"changes\": [{\"state\": {\"a\": \"dis\nabled\"}}]}",
        b"{\"changes\": {}}",
        b"{\"changes\": null}",
        b"{\"changes\": [[]]}",
        b"{\"changes\": [{}]}",
        b"{\"changes\": [], \"more\": 1}",
    ] {
        spec(command);
    }
    // Nothing is read beyond the limit, and no depth overflows a stack.
    let blanks = |count: usize| format!(r#"{{"changes": [{{"weights": {{"a": 3}}}}]{}}}"#, " ".repeat(count));
    let fits = (1 << 16) - blanks(0).len();
    assert!(spec(blanks(fits + 1).as_bytes()).contains("65537 bytes"));
    assert!(send(&serving.engine, blanks(fits).as_bytes(), operator).is_ok());
    spec("[".repeat(60_000).as_bytes());
    spec(r#"{"changes":"#.repeat(5_000).as_bytes());
    let deep = format!("{}1{}", r#"{"a":"#.repeat(20_000 / 6), "}".repeat(20_000 / 6));
    spec(format!(r#"{{"changes": [{{"replace": {{"name": "a", "config": {deep}}}}}]}}"#).as_bytes());
    // Not text, no memory, no such source.
    serving.refuses(b"{\"changes\": [\xff\xfe]}", operator, KVHOOK_ERR_INVALID_ARGUMENT);
    let nowhere = KvhStr { data: core::ptr::null(), length: 8 };
    let null = call(|error| unsafe { kvhook_control(serving.engine.raw, nowhere, operator, error) });
    assert_eq!(null.unwrap_err().0, KVHOOK_ERR_INVALID_ARGUMENT);
    serving.refuses(b"{\"changes\": []}", 7, KVHOOK_ERR_INVALID_ARGUMENT);
    serving.end();
}

#[test]
fn wrong_keys_and_types() {
    let serving = Serving::new();
    let wrong = ["3", "-1", "true", "null", "[]", "{}", "\"x\""];
    // For each key of an arm, the values that it takes.
    let keys: [(&str, &[&str]); 8] = [
        ("plugin", &["\"x\"", "null"]),
        ("config", &["null", "{}", "\"x\""]),
        ("sha256", &["null"]),
        ("min_tokens", &["3", "null"]),
        ("layers", &["null"]),
        ("weight", &["3", "-1", "null"]),
        ("state", &["null"]),
        ("guard", &["null", "{}"]),
    ];
    for (key, takes) in keys {
        for value in wrong.iter().filter(|value| !takes.contains(*value)) {
            serving.refuses_changes(&format!(r#"[{{"replace": {{"name": "a", "{key}": {value}}}}}]"#), KVHOOK_ERR_SPEC);
        }
        serving.refuses_changes(&format!(r#"[{{"replace": {{"name": "a", "{key}s": 1}}}}]"#), KVHOOK_ERR_SPEC);
    }
    for (kind, takes) in [
        ("add", &[][..]),
        ("set", &[]),
        ("replace", &[]),
        ("weights", &["{}"]),
        ("state", &["{}"]),
        ("guard", &["{}"]),
        ("safe_mode", &["true"]),
    ] {
        for value in wrong.iter().filter(|value| !takes.contains(*value)) {
            serving.refuses_changes(&format!(r#"[{{"{kind}": {value}}}]"#), KVHOOK_ERR_SPEC);
        }
    }
    serving.refuses_changes(r#"[{"remove": 3}]"#, KVHOOK_ERR_SPEC);
    serving.refuses_changes(r#"[{"remove": "x"}]"#, KVHOOK_ERR_UNKNOWN_ARM);
    for guard in [r#"{"failed": 2}"#, r#"{"failed": -0.1}"#, r#"{"sequences": 0}"#, r#"{"sequences": 1.5}"#] {
        serving.refuses_changes(&format!(r#"[{{"guard": {{"a": {guard}}}}}]"#), KVHOOK_ERR_SPEC);
    }
    serving.end();
}

#[test]
fn weights_at_their_ends() {
    let serving = Serving::new();
    for weight in ["-1", "-1e-300", "-1e308"] {
        let changes = format!(r#"[{{"weights": {{"b": 5}}}}, {{"weights": {{"a": {weight}}}}}]"#);
        serving.refuses_changes(&changes, KVHOOK_ERR_INVALID_ARGUMENT);
        let changes = format!(r#"[{{"replace": {{"name": "a", "weight": {weight}}}}}]"#);
        serving.refuses_changes(&changes, KVHOOK_ERR_SPEC);
    }
    // These are numbers, and shares: the sum of two may be too large for a number.
    for (a, b, all_to) in [("1e308", "1e308", None), ("-0.0", "1e-320", Some("b")), ("1e308", "1e-308", Some("a"))] {
        control(&serving.engine, serde_json::from_str(&format!(r#"[{{"weights": {{"a": {a}, "b": {b}}}}}]"#)).unwrap())
            .unwrap();
        let uids: Vec<u64> =
            (0..40).map(|key| serving.engine.begin_on("", &key.to_string(), 10).unwrap().uid).collect();
        assert!(uids.iter().all(|&uid| uid != 0));
        let live = |name: &str| arm(&serving.engine, name)["live"].as_u64().unwrap();
        // One sequence of `a` is there all the time.
        let (of_a, of_b) = (live("a") - 1, live("b"));
        match all_to {
            None => assert!(of_a > 8 && of_b > 8, "{of_a} and {of_b}"),
            Some(name) => assert_eq!(if name == "a" { of_a } else { of_b }, 40),
        }
        uids.iter().for_each(|&uid| serving.engine.free(uid, KVH_FREE_FINISHED).unwrap());
    }
    serving.end();
}

#[test]
fn names_that_are_no_names() {
    let serving = Serving::new();
    let long = "x".repeat(65);
    for name in ["", "none", "a\nb", "\u{1b}[2J", "a\0", "ä", "a b", "../a", "a\u{2028}b", &long] {
        let quoted = json!(name);
        serving
            .refuses_changes(&format!(r#"[{{"add": {{"name": {quoted}, "plugin": "scripted"}}}}]"#), KVHOOK_ERR_SPEC);
        for change in [
            format!(r#"{{"weights": {{{quoted}: 1}}}}"#),
            format!(r#"{{"state": {{{quoted}: "serving"}}}}"#),
            format!(r#"{{"guard": {{{quoted}: null}}}}"#),
            format!(r#"{{"remove": {quoted}}}"#),
            format!(r#"{{"replace": {{"name": {quoted}}}}}"#),
        ] {
            serving.refuses_changes(&format!("[{change}]"), KVHOOK_ERR_UNKNOWN_ARM);
        }
        // A plugin of that name, from the operator and from a model.
        let add = format!(r#"{{"changes": [{{"add": {{"name": "c", "plugin": {quoted}}}}}]}}"#);
        for source in [KVHOOK_SOURCE_OPERATOR, KVHOOK_SOURCE_MODEL] {
            let refused = send(&serving.engine, add.as_bytes(), source).unwrap_err();
            serving.refuses(add.as_bytes(), source, refused.0);
        }
    }
    serving.end();
}

#[test]
fn the_65th_arm() {
    let serving = Serving::new();
    let config = arm(&serving.engine, "a")["config"].clone();
    let add = |number: usize| json!({"add": {"name": format!("arm{number}"), "plugin": "scripted", "config": config}});
    let most: Vec<Value> = (0..61).map(add).collect();
    control(&serving.engine, json!(most)).unwrap();
    // There is room for one more, and not for two.
    let message = serving.refuses_changes(&json!([add(61), add(62)]).to_string(), KVHOOK_ERR_SPEC);
    assert!(message.contains("64 arms"), "{message}");
    control(&serving.engine, json!([add(61)])).unwrap();
    serving.refuses_changes(&json!([add(62)]).to_string(), KVHOOK_ERR_SPEC);
    // One goes and one comes in one command.
    control(&serving.engine, json!([{"remove": "arm0"}, add(62)])).unwrap();
    assert_eq!(arms(&serving.engine)["arms"].as_array().unwrap().len(), 64);
    serving.end();
}
