//! The whole example on little data, and the files that it reads and writes.

use super::*;

fn run(words: &[&str]) -> (Summary, PathBuf) {
    let out = std::env::temp_dir().join(format!("gradblend-late-fusion-{}-{}", std::process::id(), words.len()));
    let small = ["late_fusion", "--epochs", "11", "--train", "60", "--held-out", "20", "--test", "40", "--hidden", "8"];
    let out_words = ["--out", out.to_str().unwrap()];
    let args = Args::try_parse_from(small.iter().chain(&out_words).chain(words)).unwrap();
    (compare(&args).unwrap(), out)
}

/// Facts of every row that hold whatever the data.
fn check(summary: &Summary, seeds: usize, names: &[&str]) {
    let got: Vec<&str> = summary.methods.iter().map(|row| row.name.as_str()).collect();
    assert_eq!(got, names);
    for row in &summary.methods {
        let name = &row.name;
        assert_eq!(row.accuracy.len(), seeds, "{name}");
        assert!(row.accuracy.iter().all(|accuracy| (0.0..=1.0).contains(accuracy)), "{name}: {:?}", row.accuracy);
        assert_eq!(row.weights.len(), summary.modalities.len(), "{name}");
        assert!((row.weights.iter().sum::<f64>() - 1.0).abs() < 1e-6, "{name}: {:?}", row.weights);
        assert!(row.train_seconds > 0.0 && row.blend_seconds >= 0.0, "{name}");
        assert_eq!(row.ogr.is_some(), row.solved > 0, "{name}");
        let signal = row.ogr.as_ref().and_then(|ogr| ogr.signal.as_ref());
        let signals = if name.starts_with("online-gradient") { summary.modalities.len() } else { 0 };
        assert!(signal.map_or(0, Vec::len) == signals && signal.into_iter().flatten().all(|s| s.is_finite()), "{name}");
        assert!(row.held <= row.solved, "{name}");
    }
}

#[test]
fn every_method_trains_on_the_bundled_digits() {
    let json = std::env::temp_dir().join(format!("gradblend-late-fusion-{}.json", std::process::id()));
    let words =
        ["--seeds", "2", "--nuisance", "shortcut", "--train-batch", "independent", "--min-fused", "0.5", "--json"];
    let (summary, out) = run(&[&words[..], &[json.to_str().unwrap()]].concat());
    let names = [
        "alone:top",
        "alone:bottom",
        "alone:shortcut",
        "naive",
        "uniform",
        "offline-loss",
        "online-loss",
        "online-gradient-epoch",
        "online-gradient-step",
        "online-gradient-cheap",
        "online-gradient-epoch:correlated",
        "online-gradient-step:correlated",
        "online-gradient-step:min-fused",
    ];
    check(&summary, 2, &names);
    assert_eq!(summary.modalities, ["top", "bottom", "shortcut", "fused"]);
    // Super-epochs: one solve before training, one per super-epoch, one per step (2 batches per epoch), every 10th step.
    let solved: Vec<u64> = summary.methods.iter().map(|row| row.solved).collect();
    assert_eq!(solved, [0, 0, 0, 0, 0, 2, 4, 2, 44, 6, 2, 44, 44]);
    // The mean of weights that are at least a half.
    assert!(summary.methods[12].weights[3] >= 0.5, "{:?}", summary.methods[12].weights);

    let written: serde_json::Value = serde_json::from_str(&fs::read_to_string(&json).unwrap()).unwrap();
    assert_eq!(written["data"], summary.data);
    assert_eq!(written["methods"].as_array().unwrap().len(), names.len());
    assert_eq!(written["methods"][3]["name"], "naive");
    assert_eq!(written["methods"][8]["train_batch"], "independent");
    for plot in ["accuracy.svg", "weights.svg", "ogr.svg"] {
        assert!(fs::read_to_string(out.join(plot)).unwrap().ends_with("</svg>\n"), "{plot}");
    }
    let table = summary.table().unwrap().to_string();
    assert!(names.iter().all(|name| table.contains(name)), "{table}");
    fs::remove_dir_all(out).unwrap();
    fs::remove_file(json).unwrap();
}

#[test]
fn results_do_not_depend_on_threads() {
    let accuracy = |threads| {
        let (summary, out) = run(&["--seeds", "1", "--threads", threads]);
        fs::remove_dir_all(out).unwrap();
        summary.methods.into_iter().map(|row| (row.accuracy, row.weights)).collect::<Vec<_>>()
    };
    assert_eq!(accuracy("1"), accuracy("2"));
}

#[test]
fn spoken_digits_are_read_from_wav_files() {
    let folder = std::env::temp_dir().join(format!("gradblend-late-fusion-wav-{}", std::process::id()));
    let recordings = folder.join("recordings");
    fs::create_dir_all(&recordings).unwrap();
    let spec =
        hound::WavSpec { channels: 1, sample_rate: 8000, bits_per_sample: 16, sample_format: hound::SampleFormat::Int };
    // A tone per digit, in three lengths and for three speakers.
    for (speaker, name) in ["ann", "bob_b", "cy"].into_iter().enumerate() {
        for digit in 0..10 {
            for index in 0..4 {
                let path = recordings.join(format!("{digit}_{name}_{index}.wav"));
                let mut writer = hound::WavWriter::create(path, spec).unwrap();
                for i in 0..200 * (speaker + 1) * (index + 1) {
                    let phase = i as f32 * (digit + 1) as f32 * 0.2;
                    writer.write_sample((phase.sin() * 9000.0) as i16).unwrap();
                }
                writer.finalize().unwrap();
            }
        }
    }
    let images = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data/digits.csv");
    let audio = folder.to_str().unwrap();
    let sizes = ["--train", "30", "--held-out", "10", "--test", "40", "--test-speakers", "2", "--seeds", "1"];
    let words = ["--audio", audio, "--images", images];
    let small = ["late_fusion", "--epochs", "2", "--hidden", "8", "--out", audio];
    let args = Args::try_parse_from(small.iter().chain(&sizes).chain(&words)).unwrap();
    let summary = compare(&args).unwrap();
    assert_eq!(summary.modalities, ["audio", "image", "fused"]);
    assert!(summary.data.contains("test speakers bob_b, cy unseen"), "{}", summary.data);
    fs::write(recordings.join("x_ann_0.wav"), "").unwrap();
    let error = format!("{:#}", compare(&args).err().unwrap());
    assert!(error.contains("x_ann_0.wav: the name does not start with a digit from 0 to 9"), "{error}");
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_bad_image_names_its_line() {
    let good = format!("{}3\n", "1,".repeat(64));
    assert_eq!(data::parse_images(&good).unwrap().len(), 1);
    for (line, expected) in [
        ("1,2".to_owned(), "line 2: expected 64 pixels and a label, got 2 fields"),
        (good.replacen('1', "17", 1), "line 2: field 1 is \"17\", expected 0 to 16"),
        (good.replace('3', "10"), "line 2: field 65 is \"10\", expected 0 to 9"),
    ] {
        let error = format!("{:#}", data::parse_images(&(good.clone() + &line)).err().unwrap());
        assert_eq!(error, expected);
    }
}
