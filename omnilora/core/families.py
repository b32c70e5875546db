"""How libraries call the projections of a transformer block: patterns for methods that adapt some of them."""

QUERY = r"q_proj|query|q_lin|to_q|wq"
KEY = r"k_proj|key|k_lin|to_k|wk"
VALUE = r"v_proj|value|v_lin|to_v|wv"
QKV = r"query_key_value|c_attn|qkv|qkv_proj|Wqkv"
ATTENTION_OUT = r"o_proj|out_proj|out_lin|to_out|wo|attn\.c_proj|attention\.(?:output\.)?dense|self_attention\.dense"
FFN_UP = r"up_proj|gate_proj|fc1|fc_in|lin1|linear1|dense_h_to_4h|c_fc|w1|w3|wi|intermediate\.dense"
FFN_DOWN = r"down_proj|fc2|fc_out|lin2|linear2|dense_4h_to_h|mlp\.c_proj|w2|(?<!attention\.)output\.dense"


def layers(*names: str) -> str:
    """A target pattern of the layers whose path ends in one of the alternatives."""
    return rf"re:(?:.*\.)?(?:{'|'.join(names)})"
