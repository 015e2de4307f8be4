//! What a job has, whoever says it.

use std::fs;

use super::*;

struct Folder {
    dir: tempfile::TempDir,
    variables: Vec<(&'static str, String)>,
}

impl Folder {
    fn new(variables: &[(&'static str, &str)]) -> Folder {
        let own = |(name, value): &(&'static str, &str)| (*name, (*value).to_owned());
        Folder {
            dir: tempfile::tempdir().unwrap(),
            variables: variables.iter().map(own).collect(),
        }
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }

    /// The volumes, each as `VOLUME: PATH PATH`, and the warnings.
    fn asked(&self, sources: Sources) -> Result<(Vec<String>, Vec<String>), String> {
        let variable = |name: &str| {
            let mut all = self.variables.iter();
            all.find(|(known, _)| *known == name)
                .map(|(_, v)| v.clone())
        };
        let world = World {
            slug: "shop".into(),
            variable: &variable,
            folder: self.dir.path(),
        };
        let (caches, warnings) = world.asked(sources).map_err(|failure| {
            assert_eq!(failure.code, Code::Usage);
            failure.message
        })?;
        let one = |cache: &Cache| {
            let paths: Vec<String> = cache
                .paths
                .iter()
                .map(|p| p.display().to_string())
                .collect();
            format!("{}: {}", cache.volume, paths.join(" "))
        };
        Ok((caches.iter().map(one).collect(), warnings))
    }

    fn volumes(&self, sources: Sources) -> Vec<String> {
        let (volumes, warnings) = self.asked(sources).unwrap();
        assert_eq!(warnings, [""; 0]);
        volumes
    }
}

const NOTHING: Sources = Sources {
    config: None,
    pipeline: None,
    step: None,
    presets: &[],
    named: false,
};

#[test]
fn what_the_agent_hands_over_goes_before_the_own_file_and_both_only_where_nothing_is_asked() {
    let folder = Folder::new(&[(AGENT_PATHS, "node_modules, ./b/,,b")]);
    assert_eq!(folder.volumes(NOTHING), ["shop: node_modules b"]);
    folder.write(OWN_FILE, "cache: own");
    assert_eq!(folder.volumes(NOTHING), ["shop: node_modules b"]);
    let folder = Folder {
        variables: vec![(AGENT_PATHS, String::new())],
        ..folder
    };
    assert_eq!(folder.volumes(NOTHING), ["shop: own"]);
    let named = Sources {
        named: true,
        ..NOTHING
    };
    assert_eq!(folder.volumes(named), [""; 0]);
    let maven = ["maven".to_owned()];
    let preset = Sources {
        presets: &maven,
        ..NOTHING
    };
    assert_eq!(folder.volumes(preset).len(), 1, "the preset alone");
    assert_eq!(Folder::new(&[]).volumes(NOTHING), [""; 0]);
}

#[test]
fn the_step_of_a_job_is_that_of_its_variables_where_none_is_named() {
    let text = "cache: a\nsteps:\n  - {key: k, cache: b}\n  - {label: l, cache: c}\n";
    for (variables, step, expected) in [
        (
            &[("BUILDKITE_STEP_KEY", "k"), ("BUILDKITE_LABEL", "l")][..],
            None,
            "shop: a b",
        ),
        (
            &[("BUILDKITE_STEP_KEY", ""), ("BUILDKITE_LABEL", "l")],
            None,
            "shop: a c",
        ),
        (&[("BUILDKITE_STEP_KEY", "k")], Some("l"), "shop: a c"),
        (&[], None, "shop: a"),
    ] {
        let folder = Folder::new(variables);
        let file = folder.write("pipeline.yml", text);
        let sources = Sources {
            pipeline: Some(&file),
            step,
            ..NOTHING
        };
        assert_eq!(
            folder.volumes(sources),
            [expected],
            "{variables:?} {step:?}"
        );
    }
    let folder = Folder::new(&[("BUILDKITE_STEP_KEY", "elsewhere")]);
    let file = folder.write("pipeline.yml", text);
    let mut sources = Sources {
        pipeline: Some(&file),
        ..NOTHING
    };
    let (volumes, warnings) = folder.asked(sources).unwrap();
    assert_eq!(volumes, ["shop: a"]);
    assert!(warnings[0].contains("there is no step"), "{warnings:?}");
    sources.step = Some("elsewhere");
    let message = folder.asked(sources).unwrap_err();
    let start = format!("{}:3:3: there is no step", file.display());
    assert!(message.starts_with(&start), "{message}");
}

#[test]
fn what_is_wrong_with_a_file_is_named_with_the_file() {
    let folder = Folder::new(&[]);
    let config = |text: &str| {
        let file = folder.write("c.yml", text);
        let sources = Sources {
            config: Some(&file),
            ..NOTHING
        };
        folder.asked(sources)
    };
    for (text, end) in [
        (
            "cache: a\ncaches: b\n",
            "c.yml:2:1: unknown key \"caches\"; known is cache",
        ),
        ("- a", "c.yml:1:1: this is a list, and cache is a key"),
        ("cache: [a", "c.yml:2:1: "),
    ] {
        let message = config(text).unwrap_err();
        assert!(message.contains(end), "{message}");
    }
    let (_, warnings) = config("cache: {paths: a, size: 1g}").unwrap();
    assert!(
        warnings[0].contains("c.yml:1:25: the size 1g is raised"),
        "{warnings:?}"
    );
    for missing in ["none.yml", "."] {
        let file = folder.dir.path().join(missing);
        let sources = Sources {
            config: Some(&file),
            ..NOTHING
        };
        let message = folder.asked(sources).unwrap_err();
        assert!(message.starts_with("cannot read "), "{message}");
    }
}

#[test]
fn a_preset_fills_what_nothing_else_says() {
    let folder = Folder::new(&[("CARGO_HOME", "/c")]);
    folder.write("Cargo.lock", "");
    folder.write("pom.xml", "");
    let file = folder.write(
        "c.yml",
        "cache: [target, {name: maven, paths: x, size: 30g}]",
    );
    let auto = ["auto".to_owned(), "cargo".to_owned()];
    let both = Sources {
        config: Some(&file),
        presets: &auto,
        ..NOTHING
    };
    let m2 = crate::sys::process::home().unwrap().join(".m2/repository");
    let expected = [
        "shop: target".to_owned(),
        format!("shop/maven: {} x", m2.display()),
        "shop/cargo: /c/registry /c/git".to_owned(),
    ];
    assert_eq!(folder.volumes(both), expected);
    let unknown = ["maeven".to_owned()];
    let sources = Sources {
        presets: &unknown,
        ..NOTHING
    };
    let message = folder.asked(sources).unwrap_err();
    assert_eq!(message, "there is no preset maeven");
}

#[test]
fn a_path_belongs_to_one_volume() {
    let folder = Folder::new(&[]);
    let file = folder.write("c.yml", "cache: [a, {name: n, paths: ./a/}]");
    let sources = Sources {
        config: Some(&file),
        ..NOTHING
    };
    let message = folder.asked(sources).unwrap_err();
    assert_eq!(message, "a is wanted for the volumes shop and shop/n");
}

#[test]
fn of_two_that_speak_of_one_volume_the_later_one_counts_more() {
    let label = |value: &str| ("k".to_owned(), value.to_owned());
    let mut cache = Cache {
        paths: vec!["a".into()],
        size: Some(1),
        labels: vec![label("1")],
        parents: vec!["p".into()],
        read_only: Some(true),
        commit: Some(When::Never),
        ..Cache::named("v")
    };
    cache.add(Cache {
        paths: vec!["a".into(), "b".into()],
        labels: vec![label("2")],
        parents: vec!["q".into(), "r".into()],
        commit: Some(When::Always),
        ..Cache::named("v")
    });
    let expected = Cache {
        paths: vec!["a".into(), "b".into()],
        size: Some(1),
        labels: vec![label("1"), label("2")],
        parents: vec!["q".into(), "r".into()],
        read_only: Some(true),
        commit: Some(When::Always),
        ..Cache::named("v")
    };
    assert_eq!(cache, expected);
}

#[test]
fn what_detect_prints_is_as_the_manual_says_and_is_a_file_that_attach_reads() {
    let manual = include_str!("../../../docs/json.md");
    let (_, rest) = manual.split_once("```json detect\n").unwrap();
    let mut example: Value = serde_json::from_str(rest.split("```").next().unwrap()).unwrap();
    let folder = Folder::new(&[]);
    folder.write("package-lock.json", "{}");
    folder.write("uv.lock", "");
    let made = detected(folder.dir.path(), "shop");
    example["detect"]["folder"] = json!(folder.dir.path());
    assert_eq!(made, example);
    let file = folder.write("c.yml", made["detect"]["config"].as_str().unwrap());
    let from_file = Sources {
        config: Some(&file),
        ..NOTHING
    };
    let auto = ["auto".to_owned()];
    let from_presets = Sources {
        presets: &auto,
        ..NOTHING
    };
    assert_eq!(folder.volumes(from_file), folder.volumes(from_presets));
    let nothing = detected(Folder::new(&[]).dir.path(), "shop");
    assert_eq!(nothing["detect"]["config"], "");
}

proptest::proptest! {
    #[test]
    fn no_text_is_too_strange_to_be_read_or_refused(
        text in "(cache|steps|paths|name|matrix|key|[a-c0-2:{}$,&*<!|>%@\\-? \n\té'\"#\\[\\]]){0,60}",
    ) {
        let variable = |name: &str| Some(name.to_owned());
        let scope = Scope {
            slug: "shop",
            variable: &variable,
            matrix: Matrix::None,
        };
        for text in [text.clone(), format!("cache: {text}"), format!("cache:\n - {text}")] {
            let Ok(root) = yaml::parse(&text) else {
                continue;
            };
            let step = Some(Step { name: "#1", label: None });
            let cached = |node: &Node| keys::read(node, &scope, &mut Vec::new());
            for fault in [
                pipeline::caches(&root, step, &scope, &mut Vec::new()).err(),
                root.get("cache").and_then(|cache| cached(cache).err()),
            ] {
                proptest::prop_assert!(fault.is_none_or(|f| f.place.line > 0 && f.place.column > 0));
            }
        }
    }
}

#[test]
fn every_example_and_every_preset_of_the_manual_is_right() {
    let manual = include_str!("../../../docs/caches.md");
    let folder = Folder::new(&[]);
    let examples: Vec<&str> = manual
        .split("```yaml\n")
        .skip(1)
        .filter_map(|rest| rest.split("```").next())
        .collect();
    let mut pipelines = 0;
    for text in &examples {
        let file = folder.write("example.yml", text);
        let mut of = |step: Option<&str>| {
            let is_pipeline = text.contains("steps:");
            pipelines += usize::from(is_pipeline);
            folder.volumes(Sources {
                config: (!is_pipeline).then_some(&file),
                pipeline: is_pipeline.then_some(&file),
                step,
                ..NOTHING
            })
        };
        assert!(!of(None).is_empty(), "{text}");
        if text.contains("steps:") {
            assert_eq!(of(Some("#1")), ["shop: node_modules .build"]);
            let both = ["shop: node_modules", "shop/bundle: vendor/bundle"];
            assert_eq!(of(Some("spec")), both);
            assert_eq!(of(Some("lint")), [""; 0]);
            assert_eq!(of(Some("test nightly"))[1], "shop/test-nightly: target");
        }
    }
    assert_eq!((examples.len(), pipelines), (4, 5));
    for preset in &PRESETS {
        let begin = format!("\n| {} | ", preset.name);
        let (_, row) = manual.split_once(&begin).expect(preset.name);
        let row = row.lines().next().unwrap();
        let none = |_: &str| None;
        let scope = Scope {
            slug: "shop",
            variable: &none,
            matrix: Matrix::None,
        };
        for path in preset.paths {
            let path = scope
                .expand(path, yaml::Place { line: 1, column: 1 })
                .unwrap();
            assert!(
                row.contains(&format!("`{path}`")),
                "{}: {path}",
                preset.name
            );
        }
    }
}
