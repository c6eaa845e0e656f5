//! The whole example on little data, and the files that it reads and writes.

use std::fs;

use super::*;
use crate::common::outputs::TABLES;
use crate::common::train::{Set, Task};

const EMOJI: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data/emoji");
const SMALL: [&str; 13] = [
    "two_towers",
    "--epochs",
    "2",
    "--train",
    "60",
    "--held-out",
    "20",
    "--test",
    "30",
    "--batch",
    "20",
    "--fixed",
    "0.5",
];

fn folder(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("gradblend-two-towers-{}-{name}", std::process::id()))
}

/// Runs the example on little data, with a folder of its own for the results.
fn run(name: &str, words: &[&str]) -> (Summary, PathBuf) {
    let out = folder(name);
    let out_words = ["--out", out.to_str().unwrap()];
    let args = Args::try_parse_from(SMALL.iter().chain(&out_words).chain(words)).unwrap();
    (compare(&args).unwrap(), out)
}

#[test]
fn every_method_trains_and_all_results_are_written() {
    let json = folder("json");
    let (summary, out) = run("all", &["--seeds", "2", "--first-seed", "5", "--json", json.to_str().unwrap()]);
    let names = [
        "naive",
        "uniform",
        "fixed:0.5",
        "gradnorm",
        "mmpareto",
        "offline-loss",
        "online-loss",
        "online-gradient-epoch",
        "online-gradient-step",
        "online-gradient-step:floor",
    ];
    assert_eq!(summary.methods.iter().map(|row| &row.name[..]).collect::<Vec<_>>(), names);
    assert_eq!(summary.seeds, [5, 6]);
    let text = fs::read_to_string(&json).unwrap();
    let written: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (row, name) in written["methods"].as_array().unwrap().iter().zip(names) {
        assert_eq!(row["name"], name);
        for measure in ["recall_at_1", "recall_at_10", "style", "category", "subcategory"] {
            let values = row[measure].as_array().unwrap();
            assert_eq!(values.len(), 2, "{name}: {measure}");
            assert!(values.iter().all(|value| (0.0..=1.0).contains(&value.as_f64().unwrap())), "{name}: {values:?}");
        }
        let weights = row["weights"].as_array().unwrap();
        assert_eq!(weights.len(), 2);
        for weights in weights {
            let weights: Vec<f64> = weights.as_array().unwrap().iter().map(|weight| weight.as_f64().unwrap()).collect();
            assert!(weights.len() == 3 && (weights.iter().sum::<f64>() - 1.0).abs() < 1e-6, "{name}: {weights:?}");
        }
    }
    let weights = |name| &summary.row(name).unwrap().weights[0];
    assert_eq!((&weights("naive")[..], &weights("fixed:0.5")[..]), (&[0.0, 0.0, 1.0][..], &[0.25, 0.25, 0.5][..]));

    let frontier = fs::read_to_string(out.join(FRONTIER)).unwrap();
    let page = fs::read_to_string(out.join(TABLES)).unwrap();
    for knowledge in 0..KNOWLEDGE.len() {
        let verdicts = summary.verdicts(knowledge);
        // All but those with fixed weights.
        assert_eq!(verdicts.len(), names.len() - 3);
        assert!(verdicts.iter().all(|verdict| frontier.contains(verdict) && page.contains(verdict)), "{verdicts:?}");
    }
    let sheet = fs::read_to_string(out.join(SHEET)).unwrap();
    assert_eq!(sheet.matches("<image").count(), 8 * (1 + 2 * 5));
    let runs = fs::read_to_string(out.join(RUNS)).unwrap();
    let runs: Vec<serde_json::Value> = runs.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(["command", "commit", "machine", "date"].iter().all(|key| runs[0][key].is_string()), "{}", runs[0]);
    assert_eq!(runs.len(), 1 + 2 * names.len());
    for run in &runs[1..] {
        let row = summary.methods.iter().find(|row| run["method"] == row.name[..]).unwrap();
        assert_eq!(run["style"], row.style[run["seed"].as_u64().unwrap() as usize - 5]);
    }
    fs::remove_dir_all(out).unwrap();
    fs::remove_file(json).unwrap();
}

#[test]
fn results_do_not_depend_on_threads_or_other_seeds() {
    let row = |name, words: &[&str]| {
        let (mut summary, out) = run(name, words);
        fs::remove_dir_all(out).unwrap();
        let row = summary.methods.pop().unwrap();
        (row.recall_at_10, row.style, row.weights)
    };
    let one = row("one", &["--seeds", "1", "--first-seed", "1", "--threads", "1"]);
    let (recall, style, weights) = row("two", &["--seeds", "2", "--threads", "2"]);
    assert_eq!(one, (recall[1..].to_vec(), style[1..].to_vec(), weights[1..].to_vec()));
    assert_ne!((recall[0], style[0]), (recall[1], style[1]));
}

#[test]
fn samples_are_disjoint_and_losses_reach_their_towers_only() {
    let source = Source::read(EMOJI.as_ref()).unwrap();
    assert_eq!((source.emoji.len(), source.categories, source.subcategories), (1558, 8, 94));
    let data = source.draw(&Sizes { train: 40, held_out: 10, test: None }, 3).unwrap();
    let mut all: Vec<usize> =
        [&data.train, &data.held_out, &data.test].iter().flat_map(|set| set.emoji.clone()).collect();
    all.sort_unstable();
    assert_eq!(all, (0..1558).collect::<Vec<_>>());

    let network = Network::new(&source, &data, 20, 3).unwrap();
    let mut rng = common::random::random(3, "batch");
    let batch = network.batch(Set::Train, &[4, 7, 1, 30], &mut rng).unwrap();
    let reached = |loss: usize| {
        let gradients = network.loss(&batch, loss).unwrap().backward().unwrap();
        let towers = network.encoders().iter();
        towers
            .map(|tower| tower.iter().filter(|parameter| gradients.get(parameter).is_some()).count())
            .collect::<Vec<_>>()
    };
    assert_eq!([reached(0), reached(1), reached(MATCHING)], [[6, 0], [0, 4], [6, 4]]);
    // Of four pairs, the loss of chance is ln 4.
    let loss = network.loss(&batch, MATCHING).unwrap().to_scalar::<f32>().unwrap();
    assert!((loss - 4_f32.ln()).abs() < 0.7, "{loss}");
    // Of 40 pairs in batches of 39: the last pair, whose loss is 0, does not count.
    let network = Network::new(&source, &data, 39, 3).unwrap();
    let loss = network.mean_loss(Set::Train, MATCHING).unwrap();
    assert!((loss - 39_f64.ln()).abs() < 0.7, "{loss}");
}

/// The message for a command line that cannot be carried out.
fn rejected(words: &[&str]) -> String {
    let out = folder("bad-out");
    // So long that the test would not end if training started.
    let mut all = vec!["two_towers", "--epochs", "100000"];
    if !words.contains(&"--out") {
        all.extend(["--out", out.to_str().unwrap()]);
    }
    let args = Args::try_parse_from(all.iter().chain(words));
    args.map_or_else(|error| error.to_string(), |args| format!("{:#}", compare(&args).err().unwrap()))
}

#[test]
fn bad_input_is_told_before_training() {
    let data = folder("bad-data");
    fs::create_dir_all(&data).unwrap();
    for path in data::paths(EMOJI.as_ref()) {
        fs::copy(&path, data.join(path.file_name().unwrap())).unwrap();
    }
    let name = data.to_str().unwrap();
    let table = fs::read_to_string(data.join("emoji.csv")).unwrap();
    let with = |file: &str, bytes: &[u8], expected: &str| {
        let path = data.join(file);
        let good = fs::read(&path).unwrap();
        fs::write(&path, bytes).unwrap();
        let error = rejected(&["--data", name]);
        assert!(error.contains(path.to_str().unwrap()) && error.contains(expected), "{error}, expected {expected}");
        fs::write(path, good).unwrap();
    };
    with("emoji.csv", table.replacen("subcategory", "group", 1).as_bytes(), "missing field `subcategory`");
    with("emoji.csv", table.replacen("\n1,", "\n2,", 1).as_bytes(), "emoji 1 has index 2");
    with("emoji.csv", table.replacen("HASH KEY,hash", ",", 1).as_bytes(), "emoji 0 has no name");
    with("emoji.csv", table.lines().next().unwrap().as_bytes(), "there is no emoji");
    with("emoji.csv", table.repeat(2).as_bytes(), "invalid digit");
    with("noto.png", b"no picture", "Invalid PNG signature");
    let sheet = fs::read(data.join("fluent.png")).unwrap();
    with("fluent.png", &sheet[..sheet.len() / 2], "cannot read");
    let mut small = Vec::new();
    let mut encoder = png::Encoder::new(&mut small, 40, 40);
    encoder.set_color(png::ColorType::Rgb);
    encoder.write_header().unwrap().write_image_data(&[0; 4800]).unwrap();
    with("twemoji.png", &small, "the sheet has 40 x 40 pixels, but 1558 pictures need 1280 x 1248");
    fs::remove_file(data.join("openmoji.png")).unwrap();
    assert!(rejected(&["--data", name]).contains("openmoji.png"));

    let missing = folder("missing").join("x.json");
    let (missing, input) = (missing.to_str().unwrap(), format!("{EMOJI}/emoji.csv"));
    for (words, expected) in [
        (["--json", missing], "cannot write"),
        (["--json", &input], "would replace"),
        (["--out", &input], "cannot write the folder"),
        (["--data", missing], "cannot read"),
        (["--train", "1500"], "want 1701 emoji, of which there are 1558"),
        (["--test", "359"], "want 1559 emoji, of which there are 1558"),
        (["--fixed", "0.5,0.5"], "--fixed: a weight is given twice"),
        (["--fixed", "1"], "invalid value '1'"),
        (["--fixed", "0"], "invalid value '0'"),
        (["--floor", "1"], "invalid value '1'"),
        (["--seeds", "0"], "invalid value '0'"),
        (["--batch", "x"], "invalid value 'x'"),
        (["--batch", "201"], "--held-out: 200 emoji do not fill a batch of 201"),
        (["--train", "99"], "--train: 99 emoji do not fill a batch of 100"),
    ] {
        let error = rejected(&words);
        assert!(error.contains(expected), "{words:?}: {error}");
    }
    fs::remove_dir_all(data).unwrap();
    fs::remove_dir_all(folder("bad-out")).unwrap();
}
