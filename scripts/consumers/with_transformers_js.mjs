// The same with Transformers.js on Node.js; `--embed` as with_optimum.py has it.
import path from "node:path";
import { AutoModel, AutoModelForCausalLM, AutoTokenizer, env } from "@huggingface/transformers";

const [folder, prompt, count, adapter] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = `${path.dirname(path.resolve(folder))}/`;
const name = path.basename(folder);
const options = { device: "cpu" }; // config.json says which file, and how many beside it
// An adapter is a graph of its own here, which `vera-edge adapter freeze` wrote.
if (adapter) options.model_file_name = `model_${path.parse(adapter).name}`;

const found = { consumer: `@huggingface/transformers ${env.version}` };
const tokenizer = await AutoTokenizer.from_pretrained(name);
const inputs = await tokenizer(prompt);
if (count === "--embed") {
  const model = await AutoModel.from_pretrained(name, options);
  const { last_hidden_state: states } = await model(inputs);
  found.embedding = states.mean(1).tolist()[0];
} else {
  const model = await AutoModelForCausalLM.from_pretrained(name, options);
  const tokens = await model.generate({ ...inputs, max_new_tokens: Number(count), do_sample: false });
  found.text = tokenizer.decode(tokens.tolist()[0]);
  const chat = [{ role: "user", content: prompt }];
  found.chat = tokenizer.apply_chat_template(chat, { tokenize: false, add_generation_prompt: true });
}
console.log(JSON.stringify(found));
